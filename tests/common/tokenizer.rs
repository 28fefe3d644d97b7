//! The reference results of `tests/reference/tokenizer`.

use kimi_linear::tokenizer::Tokenizer;
use serde_json::Value;

use super::reference;

pub fn expected() -> Value {
    serde_json::from_str(&std::fs::read_to_string(reference("tokenizer/expected.json")).unwrap())
        .unwrap()
}

pub fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

pub fn known() -> Tokenizer {
    Tokenizer::from_dir(&reference("tokenizer")).unwrap()
}

pub fn check_texts(tokenizer: &Tokenizer) {
    let expected = expected();
    let rows = expected["encode_ordinary"].as_array().unwrap();
    assert_eq!(rows.len(), 41);
    for row in rows {
        let text = row["text"].as_str().unwrap();
        let found = tokenizer.encode_ordinary(text).unwrap();
        assert_eq!(found, ids(&row["ids"]), "{text:?}");
        assert_eq!(tokenizer.decode(&found).unwrap(), text);
        let mut stream = tokenizer.stream();
        let mut streamed: String = found
            .iter()
            .map(|&id| stream.push(id).unwrap().to_string())
            .collect();
        streamed.push_str(&stream.finish());
        assert_eq!(streamed, text);
    }
}
