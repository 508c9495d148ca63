//! The promise: `query-qmp-schema` and `query-commands` tell the truth. What is declared is read, with its type; what is not
//! declared is refused; what is answered and told is as declared. And all of it is as in QEMU's own schema, but for a
//! list that is written down here.

mod control_common;

use control_common::*;
use serde_json::{Map, Value, json};
use std::collections::{BTreeSet, HashMap};
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};

/// A schema as a client gets it.
struct Schema(HashMap<String, Value>);

impl Schema {
    fn new(answer: &Value) -> Self {
        let entities = answer.as_array().unwrap().iter();
        let named: HashMap<_, _> = entities.map(|e| (e["name"].as_str().unwrap().to_owned(), e.clone())).collect();
        assert_eq!(named.len(), answer.as_array().unwrap().len(), "a name is declared twice");
        Self(named)
    }

    fn here(lab: &Lab) -> Self {
        Self::new(&lab.ok("query-qmp-schema", json!({})))
    }

    fn of(&self, name: &Value) -> &Value {
        let name = name.as_str().unwrap();
        self.0.get(name).unwrap_or_else(|| panic!("type {name} is named, not declared"))
    }

    fn all(&self, meta: &str) -> BTreeSet<String> {
        self.0.values().filter(|e| e["meta-type"] == meta).map(|e| e["name"].as_str().unwrap().to_owned()).collect()
    }

    fn members(&self, object: &Value, value: &Value) -> Vec<Value> {
        let mut members = list(&object["members"]).clone();
        if let Some(tag) = object.get("tag") {
            let case = &value[tag.as_str().unwrap()];
            let variant = list(&object["variants"]).iter().find(|v| v["case"] == *case);
            if let Some(variant) = variant {
                members.extend(list(&self.of(&variant["type"])["members"]).clone());
            }
        }
        members
    }

    /// Values of a type that together have every member, word and variant in it.
    fn samples(&self, name: &Value, depth: usize) -> Vec<Value> {
        let of = self.of(name);
        match of["meta-type"].as_str().unwrap() {
            "builtin" => vec![match of["json-type"].as_str().unwrap() {
                "string" => json!("s"),
                "int" => json!(0),
                "boolean" => json!(false),
                other => panic!("no command takes {other}"),
            }],
            "enum" => list(&of["values"]).clone(),
            "array" => self.samples(&of["element-type"], depth).into_iter().map(|v| json!([v])).collect(),
            "alternate" => list(&of["members"])
                .iter()
                .filter(|branch| depth < 4 || branch["type"] == "str")
                .flat_map(|branch| self.samples(&branch["type"], depth))
                .collect(),
            "object" => {
                let tag = of.get("tag").and_then(Value::as_str);
                let cases: Vec<Value> = match tag {
                    Some(_) => list(&of["variants"]).iter().map(|v| v["case"].clone()).collect(),
                    None => vec![Value::Null],
                };
                cases.iter().flat_map(|case| self.object_samples(of, tag, case, depth + 1)).collect()
            }
            other => panic!("{other}"),
        }
    }

    fn object_samples(&self, of: &Value, tag: Option<&str>, case: &Value, depth: usize) -> Vec<Value> {
        let mut full = Map::new();
        tag.map(|tag| full.insert(tag.to_owned(), case.clone()));
        let mut choices = Vec::new();
        for member in self.members(of, &Value::Object(full.clone())) {
            let name = member["name"].as_str().unwrap().to_owned();
            if tag != Some(&name) {
                let samples = self.samples(&member["type"], depth);
                full.insert(name.clone(), samples[0].clone());
                choices.extend(samples.into_iter().skip(1).map(|sample| (name.clone(), sample)));
            }
        }
        let mut all = vec![Value::Object(full.clone())];
        for (name, sample) in choices {
            let mut other = full.clone();
            other.insert(name, sample);
            all.push(other.into());
        }
        all
    }

    /// All objects within a value: where they are, how errors call their members, and their declared members.
    fn objects(
        &self,
        name: &Value,
        value: &Value,
        at: &str,
        path: &str,
        found: &mut Vec<(String, String, Vec<Value>)>,
    ) {
        let of = self.of(name);
        match (of["meta-type"].as_str().unwrap(), value) {
            ("array", Value::Array(elements)) => {
                for (i, element) in elements.iter().enumerate() {
                    let path = format!("{}[{i}].", path.trim_end_matches('.'));
                    self.objects(&of["element-type"], element, &format!("{at}/{i}"), &path, found);
                }
            }
            ("alternate", value) => {
                let kind = if value.is_object() { "object" } else { "builtin" };
                let branch = list(&of["members"]).iter().find(|b| self.of(&b["type"])["meta-type"] == kind).unwrap();
                self.objects(&branch["type"], value, at, path, found);
            }
            ("object", Value::Object(members)) => {
                let declared = self.members(of, value);
                for member in &declared {
                    let name = member["name"].as_str().unwrap();
                    if let Some(value) = members.get(name) {
                        self.objects(&member["type"], value, &format!("{at}/{name}"), &format!("{path}{name}."), found);
                    }
                }
                found.push((at.to_owned(), path.to_owned(), declared));
            }
            _ => {}
        }
    }

    /// Fails unless `value` is what the type says.
    fn check(&self, name: &Value, value: &Value, path: &str) {
        let of = self.of(name);
        let good = match of["meta-type"].as_str().unwrap() {
            "builtin" => match of["json-type"].as_str().unwrap() {
                "string" => value.is_string(),
                "int" => value.is_i64() || value.is_u64(),
                "boolean" => value.is_boolean(),
                "value" => true,
                other => panic!("{other}"),
            },
            "enum" => list(&of["values"]).contains(value),
            "array" => {
                let elements = value.as_array().unwrap_or_else(|| panic!("{path} is no list"));
                elements.iter().for_each(|element| self.check(&of["element-type"], element, path));
                true
            }
            "object" => {
                let members = value.as_object().unwrap_or_else(|| panic!("{path} is no object"));
                let declared = self.members(of, value);
                for member in &declared {
                    let name = member["name"].as_str().unwrap();
                    match members.get(name) {
                        Some(value) => self.check(&member["type"], value, &format!("{path}.{name}")),
                        None => assert!(member.get("default").is_some(), "{path}.{name} is missing"),
                    }
                }
                let undeclared = members.keys().find(|name| !declared.iter().any(|m| m["name"] == name.as_str()));
                assert_eq!(undeclared, None, "{path} has it undeclared");
                true
            }
            other => panic!("{other}"),
        };
        assert!(good, "{path} is {value}, declared is {of}");
    }
}

fn list(value: &Value) -> &Vec<Value> {
    value.as_array().unwrap_or_else(|| panic!("{value} is no list"))
}

/// Calls `probe` with every sample of every command's arguments and every object in it.
fn probe_all(probe: impl Fn(&Lab, &Schema, &str, &Value, &(String, String, Vec<Value>))) {
    let lab = Lab::new(1);
    let schema = Schema::here(&lab);
    let commands = schema.all("command");
    for command in commands.iter().filter(|command| *command != "qmp_capabilities") {
        let arguments = &schema.0[command]["arg-type"];
        for sample in schema.samples(arguments, 0) {
            let mut objects = Vec::new();
            schema.objects(arguments, &sample, "", "", &mut objects);
            objects.iter().for_each(|object| probe(&lab, &schema, command, &sample, object));
        }
    }
    assert_eq!(lab.told(), [""; 0], "a probe did something");
    assert_eq!(lab.disks[0].bitmaps(), []);
}

#[test]
fn what_is_declared_is_read_and_what_is_not_is_refused() {
    probe_all(|lab, _, command, sample, (at, path, _)| {
        // Were a declared member not read, it would be named before the one that comes last.
        let mut sample = sample.clone();
        sample.pointer_mut(at).unwrap()["no-such-member"] = json!(1);
        assert_eq!(lab.err(command, sample), format!("Parameter '{path}no-such-member' is unexpected"));
    });
}

#[test]
fn members_that_are_not_optional_are_missed() {
    probe_all(|lab, _, command, sample, (at, path, members)| {
        for member in members.iter().filter(|member| member.get("default").is_none()) {
            let name = member["name"].as_str().unwrap();
            let mut sample = sample.clone();
            sample.pointer_mut(at).unwrap().as_object_mut().unwrap().remove(name);
            assert_eq!(lab.err(command, sample), format!("Parameter '{path}{name}' is missing"), "{command}");
        }
    });
}

#[test]
fn types_and_words_are_as_declared() {
    probe_all(|lab, schema, command, sample, (at, _, members)| {
        for member in members {
            let name = member["name"].as_str().unwrap();
            let of = schema.of(&member["type"]);
            let (wrong, texts): (Value, &[&str]) = match of["meta-type"].as_str().unwrap() {
                "enum" => (json!("no-such-word"), &["does not accept value 'no-such-word'"]),
                _ => (json!(1.5), &["Invalid parameter type for '", "' expects uint"]),
            };
            let mut sample = sample.clone();
            if sample.pointer(at).unwrap().get(name).is_some() {
                sample.pointer_mut(at).unwrap()[name] = wrong;
                let error = lab.err(command, sample.clone());
                assert!(texts.iter().any(|text| error.contains(text)), "{command} {sample}: {error}");
            }
        }
    });
}

#[test]
fn the_two_lists_of_commands_are_one_and_each_is_served() {
    let lab = Lab::new(1);
    let schema = Schema::here(&lab);
    let listed = lab.ok("query-commands", json!({}));
    let names: BTreeSet<String> = list(&listed).iter().map(|c| c["name"].as_str().unwrap().to_owned()).collect();
    assert_eq!(names.len(), list(&listed).len());
    assert_eq!(names, schema.all("command"));
    assert!(names.contains("qmp_capabilities"));
}

#[test]
fn answers_and_events_are_as_declared() {
    let lab = Lab::sized(&[4 * MIB, 4 * MIB]);
    let schema = Schema::here(&lab);
    let look = |lab: &Lab| {
        for command in schema.all("command") {
            let returns = &schema.0[&command]["ret-type"];
            match command.as_str() {
                "query-qmp-schema"
                | "query-commands"
                | "query-sandbox"
                | "query-version"
                | "query-block"
                | "query-block-exports"
                | "query-block-jobs"
                | "query-jobs"
                | "query-named-block-nodes" => {
                    schema.check(returns, &lab.ok(&command, json!({})), &command);
                }
                "query-checkpoints" => schema.check(returns, &lab.ok(&command, json!({})), &command),
                "query-block-dirty-bitmap" => {
                    let page = json!({ "node": "d0", "name": "b", "limit": 1 });
                    schema.check(returns, &lab.ok(&command, page), &command);
                }
                "query-changes" => {
                    for to in [json!({ "node": "d0", "from": "c" }), json!({ "node": "d0", "from": "c", "to": "d" })] {
                        schema.check(returns, &lab.ok(&command, to), &command);
                    }
                }
                "x-debug-block-dirty-bitmap-sha256" => {
                    schema.check(returns, &lab.ok(&command, json!({ "node": "d0", "name": "b" })), &command);
                }
                other => assert!(list(&schema.of(returns)["members"]).is_empty(), "{other} is not looked at here"),
            }
        }
    };
    lab.ok("block-dirty-bitmap-add", json!({ "node": "d0", "name": "b" }));
    for name in ["c", "d"] {
        lab.ok("checkpoint-create", json!({ "name": name }));
    }
    lab.ok("point-add", json!({ "node": "d1", "name": "p" }));
    look(&lab);
    lab.disks[0].dirty(0..4, 1);
    lab.raw_target("t", 4 * MIB);
    let file = lab.path("q");
    qemu_img(&["create", "-q", "-f", "qcow2", &file, "4M"]);
    lab.ok("blockdev-add", json!({ "driver": "file", "node-name": "f", "filename": file }));
    lab.ok("blockdev-add", json!({ "driver": "qcow2", "node-name": "q", "file": "f" }));
    let job = |id: &str| {
        json!({
            "job-id": id, "device": "d0", "target": "t", "sync": "bitmap", "bitmap": "b", "bitmap-mode": "never",
            "auto-finalize": false, "auto-dismiss": false, "on-source-error": "stop",
        })
    };
    lab.ok("blockdev-backup", job("j"));
    lab.event("BLOCK_JOB_PENDING");
    look(&lab);
    lab.ok("job-finalize", json!({ "id": "j" }));
    lab.state("j", "concluded");
    look(&lab);
    lab.ok("job-dismiss", json!({ "id": "j" }));
    // Every event there is.
    let hearer = Lab::new(1);
    hearer.raw_target("t", 4 * MIB);
    hearer.disks[0].source.broken.store(true, std::sync::atomic::Ordering::SeqCst);
    let arguments = json!({ "job-id": "j", "device": "d0", "target": "t", "sync": "full", "auto-dismiss": false });
    hearer.ok("blockdev-backup", arguments.clone());
    let mut told = Vec::new();
    let mut hear = |last: (&str, &str)| loop {
        let event = hearer.wait(|_| true);
        schema.check(&schema.0[&event.name]["arg-type"], &event.data, &event.name);
        told.push(event.name.clone());
        if event.name == last.0 && (last.1.is_empty() || event.data["status"] == last.1) {
            break;
        }
    };
    hear(("JOB_STATUS_CHANGE", "concluded"));
    let failed = hearer.ok("query-jobs", json!({}));
    assert!(failed[0]["error"].is_string(), "{failed}");
    schema.check(&schema.0["query-jobs"]["ret-type"], &failed, "query-jobs");
    schema.check(
        &schema.0["query-block-jobs"]["ret-type"],
        &hearer.ok("query-block-jobs", json!({})),
        "query-block-jobs",
    );
    hearer.ok("job-dismiss", json!({ "id": "j" }));
    hear(("JOB_STATUS_CHANGE", "null"));
    hearer.disks[0].source.broken.store(false, std::sync::atomic::Ordering::SeqCst);
    let mut pending = arguments.clone();
    pending["auto-finalize"] = json!(false);
    hearer.ok("blockdev-backup", pending);
    hear(("BLOCK_JOB_PENDING", ""));
    hearer.ok("job-cancel", json!({ "id": "j" }));
    hear(("JOB_STATUS_CHANGE", "concluded"));
    let unix = json!({ "type": "unix", "data": { "path": hearer.path("nbd") } });
    hearer.ok("nbd-server-start", json!({ "addr": unix }));
    hearer.ok("block-export-add", json!({ "type": "nbd", "id": "e", "node-name": "d0" }));
    let exports = hearer.ok("query-block-exports", json!({}));
    schema.check(&schema.0["query-block-exports"]["ret-type"], &exports, "query-block-exports");
    hearer.ok("nbd-server-stop", json!({}));
    hear(("BLOCK_EXPORT_DELETED", ""));
    hearer.ok("quit", json!({}));
    hear(("SHUTDOWN", ""));
    let told: BTreeSet<String> = told.into_iter().collect();
    assert_eq!(told, schema.all("event"), "an event that is declared was not seen, or the other way round");
}

// ---- beside QEMU

fn schema_of_qemu() -> Schema {
    let mut daemon = Command::new("qemu-storage-daemon")
        .args(["--chardev", "stdio,id=m", "--monitor", "chardev=m"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("qemu-storage-daemon is installed");
    let mut stdin = daemon.stdin.take().unwrap();
    for command in ["qmp_capabilities", "query-qmp-schema"] {
        writeln!(stdin, "{}", json!({ "execute": command })).unwrap();
    }
    // Told to quit before the answer is read, it would send a part of it.
    let lines = BufReader::new(daemon.stdout.take().unwrap()).lines();
    let mut answers = lines.map(|line| serde_json::from_str::<Value>(&line.unwrap()).unwrap());
    let schema = answers.find(|answer| answer["return"].is_array()).expect("an answer comes");
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    Schema::new(&schema["return"])
}

/// What is other than in QEMU, told as lines; what QEMU has besides is told by the next test.
struct Comparison<'a> {
    here: &'a Schema,
    qemu: &'a Schema,
    seen: BTreeSet<(String, String)>,
    lines: Vec<String>,
}

impl Comparison<'_> {
    fn compare(&mut self, mine: &Value, theirs: &Value, path: &str) {
        if !self.seen.insert((mine.to_string(), theirs.to_string())) {
            return;
        }
        let (mine, theirs) = (self.here.of(mine).clone(), self.qemu.of(theirs).clone());
        if mine["meta-type"] != theirs["meta-type"] {
            return self.lines.push(format!("{path}: {} here, {} there", mine["meta-type"], theirs["meta-type"]));
        }
        match mine["meta-type"].as_str().unwrap() {
            "builtin" if mine["json-type"] != theirs["json-type"] => self.lines.push(format!("{path}: another type")),
            "builtin" => {}
            "enum" => {
                for value in list(&mine["values"]).iter().filter(|value| !list(&theirs["values"]).contains(value)) {
                    self.lines.push(format!("{path}: {value}"));
                }
            }
            "array" => self.compare(&mine["element-type"], &theirs["element-type"], path),
            "alternate" => {
                for branch in list(&mine["members"]) {
                    let kind = &self.here.of(&branch["type"])["meta-type"];
                    let like = list(&theirs["members"]).iter().find(|b| self.qemu.of(&b["type"])["meta-type"] == *kind);
                    self.compare(&branch["type"], &like.unwrap()["type"], path);
                }
            }
            "object" => {
                self.members(&mine, &theirs, path);
                for variant in mine.get("variants").map(list).into_iter().flatten() {
                    let path = format!("{path}({})", variant["case"].as_str().unwrap());
                    // Words that QEMU does not have are told as such already.
                    let Some(like) = list(&theirs["variants"]).iter().find(|v| v["case"] == variant["case"]) else {
                        continue;
                    };
                    self.compare(&variant["type"], &like["type"], &path);
                }
            }
            other => panic!("{other}"),
        }
    }

    fn members(&mut self, mine: &Value, theirs: &Value, path: &str) {
        for member in list(&mine["members"]) {
            let path = format!("{path}.{}", member["name"].as_str().unwrap());
            match list(&theirs["members"]).iter().find(|m| m["name"] == member["name"]) {
                None => self.lines.push(format!("{path}: only here")),
                Some(like) if like.get("default").is_some() != member.get("default").is_some() => {
                    self.lines.push(format!("{path}: optional in one of the two"));
                }
                Some(like) => self.compare(&member["type"], &like["type"], &path),
            }
        }
        let has = |like: &&Value| list(&mine["members"]).iter().any(|m| m["name"] == like["name"]);
        for like in list(&theirs["members"]).iter().filter(|like| like.get("default").is_none() && !has(like)) {
            self.lines.push(format!("{path}.{}: only there", like["name"].as_str().unwrap()));
        }
    }
}

#[test]
fn all_that_is_declared_is_declared_so_in_qemu() {
    let (here, qemu) = (Schema::here(&Lab::new(1)), schema_of_qemu());
    let mut comparison = Comparison { here: &here, qemu: &qemu, seen: BTreeSet::new(), lines: Vec::new() };
    for name in here.all("command").iter().filter(|name| !OUR_OWN.contains(&name.as_str())) {
        let (mine, theirs) = (&here.0[name], &qemu.0[name]);
        comparison.compare(&mine["arg-type"], &theirs["arg-type"], name);
        comparison.compare(&mine["ret-type"], &theirs["ret-type"], &format!("{name}:"));
    }
    // The storage daemon has no guest, and declares no SHUTDOWN.
    for name in here.all("event").iter().filter(|name| *name != "SHUTDOWN") {
        comparison.compare(&here.0[name]["arg-type"], &qemu.0[name]["arg-type"], name);
    }
    comparison.lines.sort();
    assert_eq!(comparison.lines, ONLY_HERE);
}

/// What QEMU has no command for.
const OUR_OWN: &[&str] = &[
    "block-dirty-bitmap-abdicate",
    "block-dirty-bitmap-create-successor",
    "block-dirty-bitmap-populate",
    "block-dirty-bitmap-reclaim",
    "checkpoint-create",
    "checkpoint-delete",
    "job-retry",
    "point-add",
    "point-remove",
    "query-block-dirty-bitmap",
    "query-changes",
    "query-checkpoints",
    "query-sandbox",
];

const ONLY_HERE: &[&str] = &[
    "block-job-change.max-guest-latency: only here",
    "block-job-change.type: \"bitmap-populate\"",
    "blockdev-backup.cbw-timeout: only here",
    "blockdev-backup.max-guest-latency: only here",
    "blockdev-backup.on-cbw-error: only here",
    "blockdev-backup.on-failure: only here",
    "drive-backup.cbw-timeout: only here",
    "drive-backup.max-guest-latency: only here",
    "drive-backup.on-cbw-error: only here",
    "drive-backup.on-failure: only here",
    "query-block-jobs:.max-guest-latency: only here",
    "query-block:.inserted.dirty-bitmaps.freeze-id: only here",
    "query-block:.inserted.dirty-bitmaps.frozen-by: only here",
    "query-block:.inserted.dirty-bitmaps.frozen: only here",
    "query-block:.inserted.point: only here",
    "query-block:.inserted.scratch: only here",
    "query-jobs:.kept: only here",
    "transaction.actions.type: \"block-dirty-bitmap-abdicate\"",
    "transaction.actions.type: \"block-dirty-bitmap-create-successor\"",
    "transaction.actions.type: \"block-dirty-bitmap-populate\"",
    "transaction.actions.type: \"block-dirty-bitmap-reclaim\"",
    "transaction.actions.type: \"checkpoint-create\"",
    "transaction.actions.type: \"checkpoint-delete\"",
    "transaction.actions.type: \"point-add\"",
    "transaction.actions.type: \"point-remove\"",
];

/// What a client may find in QEMU's schema and use, and is refused here by name.
#[test]
fn members_that_only_qemu_has_are_refused() {
    let lab = Lab::new(1);
    let (here, qemu) = (Schema::here(&lab), schema_of_qemu());
    let mut refused = BTreeSet::new();
    for command in here.all("command").iter().filter(|command| *command != "qmp_capabilities") {
        let arguments = &here.0[command]["arg-type"];
        if OUR_OWN.contains(&command.as_str()) {
            continue;
        }
        for sample in here.samples(arguments, 2) {
            // Variants are looked at in full: their members are those of the whole object.
            let (mine, theirs) = (here.of(arguments), qemu.of(&qemu.0[command]["arg-type"]));
            let declared = here.members(mine, &sample);
            for member in qemu.members(theirs, &sample) {
                if declared.iter().any(|m| m["name"] == member["name"]) {
                    continue;
                }
                let name = member["name"].as_str().unwrap();
                let mut sample = sample.clone();
                sample[name] = json!("s");
                let error = lab.err(command, sample);
                assert!(
                    error == format!("Parameter '{name}' is unexpected")
                        || error.starts_with(&format!("Parameter '{name}' is not supported")),
                    "{command} {name}: {error}"
                );
                refused.insert(format!("{command} {name}"));
            }
        }
    }
    let refused: Vec<&str> = refused.iter().map(String::as_str).collect();
    assert_eq!(refused, REFUSED);
}

const REFUSED: &[&str] = &[
    "blockdev-add active",
    "blockdev-add backing",
    "blockdev-add data-file",
    "blockdev-add discard-no-unref",
    "blockdev-add encrypt",
    "blockdev-add offset",
    "blockdev-add overlap-check",
    "blockdev-add pr-manager",
    "blockdev-add size",
    "blockdev-add tls-creds",
    "blockdev-add tls-hostname",
    "blockdev-add x-check-cache-dropped",
    "blockdev-add x-dirty-bitmap",
    "nbd-server-start tls-authz",
    "object-add passwordid",
    "object-add priority",
    "object-add sanity-check",
];
