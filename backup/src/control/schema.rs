//! What the commands and events look like, as data, and `query-qmp-schema`, which tells it in QEMU's form.
//!
//! `commands` declares each command once: its name, who handles it, its arguments, its answer. The declarations say what the
//! handlers read; `tests/control_schema.rs` probes every command with every member that is declared and with members that
//! are not, so the two cannot drift apart. As in QEMU, names of types are masked: they are numbers without meaning, and
//! only names of commands, events, members and enumeration values can be relied upon.

use super::Control;
use super::commands::{self, COMMANDS, EVENTS};
use crate::qmp::{Arguments, QmpError};
use serde_json::{Map, Value, json};

/// The type of a member, an element or an answer.
#[derive(Clone, Copy)]
pub(super) enum Type {
    /// A string.
    Str,
    /// An integer.
    Int,
    /// True or false.
    Bool,
    /// Any value.
    Any,
    /// One of these words.
    Enum(&'static [&'static str]),
    /// An object.
    Object(&'static Object),
    /// A list.
    Array(&'static Type),
    /// Any one of these.
    Alternate(&'static [Type]),
}

/// One member of an object.
pub(super) struct Member {
    pub(super) name: &'static str,
    pub(super) of: Type,
    pub(super) optional: bool,
    pub(super) features: &'static [&'static str],
}

/// A member that has to be there.
pub(super) const fn required(name: &'static str, of: Type) -> Member {
    Member { name, of, optional: false, features: &[] }
}

/// A member that may be there.
pub(super) const fn optional(name: &'static str, of: Type) -> Member {
    Member { name, of, optional: true, features: &[] }
}

/// An object. Its members are given in groups, so that objects can share some.
pub(super) struct Object {
    pub(super) members: &'static [&'static [Member]],
    /// For a union: the member that tells the variants apart, and what each has besides the members above.
    pub(super) union: Option<(&'static str, &'static [(&'static str, &'static Object)])>,
}

/// An object that is no union.
pub(super) const fn object(members: &'static [&'static [Member]]) -> Object {
    Object { members, union: None }
}

/// `{}`, which is also what most commands take or return.
pub(super) static EMPTY: Object = object(&[]);

/// Numbers types in the order in which they are met.
struct Schema {
    /// Where a static type stands, and its masked name.
    seen: Vec<(Key, String)>,
    types: Vec<Value>,
    builtin: Vec<&'static str>,
}

/// What makes two types one: the same declaration, for words the same words.
#[derive(PartialEq)]
enum Key {
    Object(*const Object),
    Enum(&'static [&'static str]),
    Array(String),
    Alternate(*const Type),
}

impl Schema {
    fn builtin(&mut self, name: &'static str, json_type: &str) -> String {
        if !self.builtin.contains(&name) {
            self.builtin.push(name);
            self.types.push(json!({ "name": name, "meta-type": "builtin", "json-type": json_type }));
        }
        name.to_owned()
    }

    /// The masked name of what `key` stands for, made by `describe` when it is met for the first time.
    fn named(&mut self, key: Key, describe: impl FnOnce(&mut Self, &str) -> Value) -> String {
        if let Some((_, name)) = self.seen.iter().find(|(seen, _)| *seen == key) {
            return name.clone();
        }
        let name = match &key {
            Key::Array(element) => format!("[{element}]"),
            _ => self.seen.len().to_string(),
        };
        // Named before it is described: a type may contain itself.
        self.seen.push((key, name.clone()));
        let place = self.types.len();
        self.types.push(Value::Null);
        self.types[place] = describe(self, &name);
        name
    }

    fn of(&mut self, of: &'static Type) -> String {
        match of {
            Type::Str => self.builtin("str", "string"),
            Type::Int => self.builtin("int", "int"),
            Type::Bool => self.builtin("bool", "boolean"),
            Type::Any => self.builtin("any", "value"),
            Type::Enum(values) => self.named(Key::Enum(values), |_, name| {
                let members: Vec<Value> = values.iter().map(|value| json!({ "name": value })).collect();
                json!({ "name": name, "meta-type": "enum", "members": members, "values": values })
            }),
            Type::Object(object) => self.object(object),
            Type::Array(element) => {
                let element = self.of(element);
                self.named(
                    Key::Array(element.clone()),
                    |_, name| json!({ "name": name, "meta-type": "array", "element-type": element }),
                )
            }
            Type::Alternate(types) => self.named(Key::Alternate(types.as_ptr()), |schema, name| {
                let members: Vec<Value> = types.iter().map(|of| json!({ "type": schema.of(of) })).collect();
                json!({ "name": name, "meta-type": "alternate", "members": members })
            }),
        }
    }

    fn object(&mut self, object: &'static Object) -> String {
        self.named(Key::Object(object), |schema, name| {
            let members = object.members.iter().copied().flatten().map(|member| {
                let mut told = json!({ "name": member.name, "type": schema.of(&member.of) });
                if member.optional {
                    told["default"] = Value::Null;
                }
                if !member.features.is_empty() {
                    told["features"] = json!(member.features);
                }
                told
            });
            let members: Vec<Value> = members.collect();
            let mut told = json!({ "name": name, "meta-type": "object", "members": members });
            if let Some((tag, variants)) = object.union {
                let variants = variants.iter().map(|(case, of)| json!({ "case": case, "type": schema.object(of) }));
                told["variants"] = variants.collect();
                told["tag"] = tag.into();
            }
            told
        })
    }
}

pub(super) fn query(_: &Control, arguments: Arguments) -> Result<Value, QmpError> {
    arguments.finish()?;
    let mut schema = Schema { seen: Vec::new(), types: Vec::new(), builtin: Vec::new() };
    let mut entities = Vec::new();
    for (name, data) in EVENTS {
        entities.push(json!({ "name": name, "meta-type": "event", "arg-type": schema.object(data) }));
    }
    for command in COMMANDS.iter().chain([&commands::NEGOTIATION]) {
        let mut told = Map::new();
        told.insert("name".into(), command.name.into());
        told.insert("meta-type".into(), "command".into());
        told.insert("arg-type".into(), schema.object(command.arguments).into());
        told.insert("ret-type".into(), schema.of(&command.returns).into());
        if !command.features.is_empty() {
            told.insert("features".into(), json!(command.features));
        }
        entities.push(told.into());
    }
    entities.append(&mut schema.types);
    Ok(entities.into())
}
