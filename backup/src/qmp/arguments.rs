//! Typed access to a command's arguments, with QEMU's texts for whatever is wrong with them.
//!
//! Commands read their members one by one, in the order of QEMU's schema, and then call [`Arguments::finish`], which
//! refuses what nobody read: all of it before anything is done, so that a misspelt argument changes nothing. The
//! first member found wrong is the one that is named, by its path (`actions[0].data.node`). Where QEMU names just
//! the member and not its path (values of enumerations, ranges, alternates), so is done here.

use serde_json::{Map, Value};

use super::error::QmpError;

/// The members of one object that have not been read yet.
#[derive(Clone, Debug)]
pub struct Arguments {
    /// Where the object stands: empty, or for instance `actions[0].data.`.
    path: String,
    members: Map<String, Value>,
}

/// One element of a list.
#[derive(Clone, Debug)]
pub struct Element {
    path: String,
    value: Value,
}

/// A member that is either a string or an object: QEMU's alternates such as `BlockdevRef`.
#[derive(Clone, Debug)]
pub enum StringOrObject {
    /// A string, usually the name of something.
    String(String),
    /// An object, usually its description.
    Object(Arguments),
}

fn wrong_type(path: &str, expected: &str) -> QmpError {
    QmpError::generic(format!("Invalid parameter type for '{path}', expected: {expected}"))
}

fn wrong_range(name: &str, expected: &str) -> QmpError {
    QmpError::generic(format!("Parameter '{name}' expects {expected}"))
}

impl Arguments {
    /// The arguments of a command.
    pub fn new(members: Map<String, Value>) -> Arguments {
        Arguments { path: String::new(), members }
    }

    /// Whether a member is there, and not read yet.
    pub fn has(&self, name: &str) -> bool {
        self.members.contains_key(name)
    }

    /// Whether nothing is there that has not been read.
    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// The full name of a member, for error texts.
    pub fn path_of(&self, name: &str) -> String {
        format!("{}{name}", self.path)
    }

    /// The error for a member that has to be there.
    pub fn missing(&self, name: &str) -> QmpError {
        QmpError::generic(format!("Parameter '{}' is missing", self.path_of(name)))
    }

    /// Refuses members that nobody read. To be called after the last one was read and before anything is done.
    pub fn finish(self) -> Result<(), QmpError> {
        match self.members.keys().next() {
            None => Ok(()),
            Some(name) => Err(QmpError::generic(format!("Parameter '{}' is unexpected", self.path_of(name)))),
        }
    }

    /// Takes a member of any type.
    pub fn opt_value(&mut self, name: &str) -> Option<Value> {
        self.members.shift_remove(name)
    }

    /// Takes a member of any type that has to be there.
    pub fn value(&mut self, name: &str) -> Result<Value, QmpError> {
        self.opt_value(name).ok_or_else(|| self.missing(name))
    }

    fn required<T>(&self, name: &str, member: Option<T>) -> Result<T, QmpError> {
        member.ok_or_else(|| self.missing(name))
    }

    /// Takes a string.
    pub fn opt_string(&mut self, name: &str) -> Result<Option<String>, QmpError> {
        match self.opt_value(name) {
            None => Ok(None),
            Some(Value::String(string)) => Ok(Some(string)),
            Some(_) => Err(wrong_type(&self.path_of(name), "string")),
        }
    }

    /// Takes a string that has to be there.
    pub fn string(&mut self, name: &str) -> Result<String, QmpError> {
        let member = self.opt_string(name)?;
        self.required(name, member)
    }

    /// Takes a string that has several names, for instance `node` here and `device` in older scripts: the first that
    /// is there counts, and a second one is refused by [`Arguments::finish`]. If none is, the first is missing.
    pub fn string_of(&mut self, names: &[&str]) -> Result<String, QmpError> {
        let first = names.first().copied().unwrap_or_default();
        let name = names.iter().copied().find(|name| self.has(name)).unwrap_or(first);
        self.string(name)
    }

    /// Takes a boolean.
    pub fn opt_bool(&mut self, name: &str) -> Result<Option<bool>, QmpError> {
        match self.opt_value(name) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(value)),
            Some(_) => Err(wrong_type(&self.path_of(name), "boolean")),
        }
    }

    /// Takes a boolean that has to be there.
    pub fn bool(&mut self, name: &str) -> Result<bool, QmpError> {
        let member = self.opt_bool(name)?;
        self.required(name, member)
    }

    /// Takes a signed integer (QEMU's `int`).
    pub fn opt_i64(&mut self, name: &str) -> Result<Option<i64>, QmpError> {
        match self.opt_value(name) {
            None => Ok(None),
            Some(value) => match value.as_i64() {
                Some(number) => Ok(Some(number)),
                None => Err(wrong_type(&self.path_of(name), "integer")),
            },
        }
    }

    /// Takes a signed integer that has to be there.
    pub fn i64(&mut self, name: &str) -> Result<i64, QmpError> {
        let member = self.opt_i64(name)?;
        self.required(name, member)
    }

    /// Takes an unsigned integer (QEMU's `uint64` and `size`).
    pub fn opt_u64(&mut self, name: &str) -> Result<Option<u64>, QmpError> {
        match self.opt_value(name) {
            None => Ok(None),
            Some(value) => match value.as_u64() {
                Some(number) => Ok(Some(number)),
                None => Err(wrong_range(&self.path_of(name), "uint64")),
            },
        }
    }

    /// Takes an unsigned integer that has to be there.
    pub fn u64(&mut self, name: &str) -> Result<u64, QmpError> {
        let member = self.opt_u64(name)?;
        self.required(name, member)
    }

    /// Takes an unsigned integer of 32 bits.
    pub fn opt_u32(&mut self, name: &str) -> Result<Option<u32>, QmpError> {
        self.opt_narrow(name, "uint32_t")
    }

    /// Takes an unsigned integer of 32 bits that has to be there.
    pub fn u32(&mut self, name: &str) -> Result<u32, QmpError> {
        let member = self.opt_u32(name)?;
        self.required(name, member)
    }

    /// Takes an unsigned integer of 16 bits.
    pub fn opt_u16(&mut self, name: &str) -> Result<Option<u16>, QmpError> {
        self.opt_narrow(name, "uint16_t")
    }

    /// Takes an unsigned integer of 32 bits that may be written as a decimal string, as in the mails of 2015:
    /// `"granularity": "32768"`.
    pub fn opt_u32_or_decimal(&mut self, name: &str) -> Result<Option<u32>, QmpError> {
        if let Some(Value::String(digits)) = self.members.get(name)
            && !digits.is_empty()
            && digits.bytes().all(|digit| digit.is_ascii_digit())
        {
            let number = digits.parse().map_err(|_| wrong_range(name, "uint32_t"))?;
            self.members.shift_remove(name);
            return Ok(Some(number));
        }
        self.opt_u32(name)
    }

    fn opt_narrow<T: TryFrom<u64>>(&mut self, name: &str, expected: &str) -> Result<Option<T>, QmpError> {
        let Some(value) = self.opt_value(name) else { return Ok(None) };
        if !value.is_i64() && !value.is_u64() {
            return Err(wrong_range(&self.path_of(name), "uint64"));
        }
        match value.as_u64().map(T::try_from) {
            Some(Ok(number)) => Ok(Some(number)),
            _ => Err(wrong_range(name, expected)),
        }
    }

    /// Takes one of several words.
    pub fn opt_choice<T: Clone>(&mut self, name: &str, choices: &[(&str, T)]) -> Result<Option<T>, QmpError> {
        let Some(word) = self.opt_string(name)? else { return Ok(None) };
        match choices.iter().find(|(choice, _)| *choice == word) {
            Some((_, value)) => Ok(Some(value.clone())),
            None => Err(QmpError::generic(format!("Parameter '{name}' does not accept value '{word}'"))),
        }
    }

    /// Takes one of several words that has to be there.
    pub fn choice<T: Clone>(&mut self, name: &str, choices: &[(&str, T)]) -> Result<T, QmpError> {
        let member = self.opt_choice(name, choices)?;
        self.required(name, member)
    }

    /// Takes an object, whose [`Arguments::finish`] has to be called too.
    pub fn opt_object(&mut self, name: &str) -> Result<Option<Arguments>, QmpError> {
        match self.opt_value(name) {
            None => Ok(None),
            Some(value) => Element { path: self.path_of(name), value }.object().map(Some),
        }
    }

    /// Takes an object that has to be there.
    pub fn object(&mut self, name: &str) -> Result<Arguments, QmpError> {
        let member = self.opt_object(name)?;
        self.required(name, member)
    }

    /// Takes a string or an object; `kind` is the name of the type in QEMU's schema.
    pub fn opt_string_or_object(&mut self, name: &str, kind: &str) -> Result<Option<StringOrObject>, QmpError> {
        match self.opt_value(name) {
            None => Ok(None),
            Some(Value::String(string)) => Ok(Some(StringOrObject::String(string))),
            Some(Value::Object(members)) => {
                let path = format!("{}.", self.path_of(name));
                Ok(Some(StringOrObject::Object(Arguments { path, members })))
            }
            Some(_) => Err(wrong_type(name, kind)),
        }
    }

    /// Takes a string or an object that has to be there.
    pub fn string_or_object(&mut self, name: &str, kind: &str) -> Result<StringOrObject, QmpError> {
        let member = self.opt_string_or_object(name, kind)?;
        self.required(name, member)
    }

    /// Takes a list.
    pub fn opt_list(&mut self, name: &str) -> Result<Option<Vec<Element>>, QmpError> {
        let path = self.path_of(name);
        match self.opt_value(name) {
            None => Ok(None),
            Some(Value::Array(values)) => {
                let element = |(at, value)| Element { path: format!("{path}[{at}]"), value };
                Ok(Some(values.into_iter().enumerate().map(element).collect()))
            }
            Some(_) => Err(wrong_type(&path, "array")),
        }
    }

    /// Takes a list that has to be there.
    pub fn list(&mut self, name: &str) -> Result<Vec<Element>, QmpError> {
        let member = self.opt_list(name)?;
        self.required(name, member)
    }

    /// All members as they are, for commands that pass them on.
    pub fn into_members(self) -> Map<String, Value> {
        self.members
    }
}

impl Element {
    /// The element as a string.
    pub fn string(self) -> Result<String, QmpError> {
        match self.value {
            Value::String(string) => Ok(string),
            _ => Err(wrong_type(&self.path, "string")),
        }
    }

    /// The element as an object.
    pub fn object(self) -> Result<Arguments, QmpError> {
        match self.value {
            Value::Object(members) => Ok(Arguments { path: format!("{}.", self.path), members }),
            _ => Err(wrong_type(&self.path, "object")),
        }
    }

    /// The element as a string or an object. QEMU calls an element of neither kind 'null', and so is done here.
    pub fn string_or_object(self, kind: &str) -> Result<StringOrObject, QmpError> {
        match self.value {
            Value::String(string) => Ok(StringOrObject::String(string)),
            Value::Object(_) => self.object().map(StringOrObject::Object),
            _ => Err(wrong_type("null", kind)),
        }
    }

    /// The element as it is.
    pub fn into_value(self) -> Value {
        self.value
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn arguments(value: Value) -> Arguments {
        let Value::Object(members) = value else { panic!("not an object") };
        Arguments::new(members)
    }

    #[test]
    fn a_decimal_string_is_taken_where_the_mails_of_2015_have_one() {
        let read = |value: Value| arguments(json!({ "granularity": value })).opt_u32_or_decimal("granularity");
        assert_eq!(read(json!("32768")), Ok(Some(32768)));
        assert_eq!(read(json!(32768)), Ok(Some(32768)));
        assert_eq!(read(json!("4294967296")).unwrap_err().desc, "Parameter 'granularity' expects uint32_t");
        for wrong in [json!("32k"), json!(""), json!("-1"), json!(1.5), json!(null)] {
            assert_eq!(read(wrong).unwrap_err().desc, "Parameter 'granularity' expects uint64");
        }
    }

    #[test]
    fn of_two_spellings_the_first_counts_and_the_second_is_unexpected() {
        let mut both = arguments(json!({ "device": "a", "node": "b" }));
        assert_eq!(both.string_of(&["node", "device"]).unwrap(), "b");
        assert_eq!(both.finish().unwrap_err().desc, "Parameter 'device' is unexpected");
        let none = arguments(json!({})).string_of(&["node", "device"]);
        assert_eq!(none.unwrap_err().desc, "Parameter 'node' is missing");
    }
}
