//! `key=value,key=value` as QEMU writes it: a doubled comma is a comma.

use super::error::ConfigError;

/// Keys and values in the order they came; each key once.
pub(super) fn parse(text: &str) -> Result<Vec<(String, String)>, ConfigError> {
    let mut pairs: Vec<(String, String)> = Vec::new();
    for item in split(text) {
        let (key, value) = item
            .split_once('=')
            .filter(|(key, _)| !key.is_empty())
            .ok_or_else(|| ConfigError::NotAPair(item.clone()))?;
        if pairs.iter().any(|(k, _)| k == key) {
            return Err(ConfigError::DuplicateKey(key.to_owned()));
        }
        pairs.push((key.to_owned(), value.to_owned()));
    }
    Ok(pairs)
}

/// Splits at single commas and undoubles the others.
fn split(text: &str) -> Vec<String> {
    let mut items = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        if c == ',' && chars.next_if_eq(&',').is_none() {
            items.push(String::new());
        } else if let Some(item) = items.last_mut() {
            item.push(c);
        }
    }
    items
}
