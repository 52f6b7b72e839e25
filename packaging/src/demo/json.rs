//! Reading what the programs print with `-o json`, in whichever shape.

use anyhow::Context as _;
use serde_json::Value;

/// JSON values one after the other; what is not JSON ends the list.
pub(super) fn json(bytes: &[u8]) -> Vec<Value> {
    serde_json::Deserializer::from_slice(bytes).into_iter().map_while(Result::ok).collect()
}

/// The rows of a list, whether it is an array, a page or one object a line.
pub(super) fn items(values: &[Value]) -> Vec<&Value> {
    match values {
        [Value::Array(rows)] => rows.iter().collect(),
        [Value::Object(page)] if page.contains_key("items") => {
            page["items"].as_array().into_iter().flatten().collect()
        }
        rows => rows.iter().collect(),
    }
}

/// Every object, however deep, that has all of `keys`.
pub(super) fn objects<'v>(values: &'v [Value], keys: &[&str]) -> Vec<&'v Value> {
    let mut found = Vec::new();
    let mut open: Vec<&Value> = values.iter().rev().collect();
    while let Some(value) = open.pop() {
        if let Value::Object(map) = value {
            if keys.iter().all(|key| map.contains_key(*key)) {
                found.push(value);
            }
            open.extend(map.values());
        } else if let Value::Array(rows) = value {
            open.extend(rows.iter().rev());
        }
    }
    found
}

/// A text in an object; empty if there is none.
pub(super) fn text<'v>(value: &'v Value, key: &str) -> &'v str {
    value.get(key).and_then(Value::as_str).unwrap_or_default()
}

/// A number in an object.
///
/// # Errors
/// If there is none.
pub(super) fn number(value: &Value, key: &str) -> anyhow::Result<u64> {
    value.get(key).and_then(Value::as_u64).with_context(|| format!("there is no number `{key}` in {value}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_and_objects_are_found_in_every_shape_of_output() {
        for output in
            [r#"[{"a":1,"b":[{"a":2}]}]"#, r#"{"items":[{"a":1,"b":[{"a":2}]}]}"#, r#"{"a":1} {"a":2}"#]
        {
            let values = json(output.as_bytes());
            assert_eq!(objects(&values, &["a"]).len(), 2, "{output}");
            assert_eq!(items(&values)[0]["a"], 1, "{output}");
            assert_eq!(number(items(&values)[0], "a").unwrap(), 1);
            assert!(number(items(&values)[0], "c").is_err());
        }
        assert!(items(&json(b"[]")).is_empty());
    }
}
