//! Streams whose events have names.

use serde_json::Value;

use super::harness::Running;

/// The events of a stream in order, each with its name.
pub async fn named(server: &Running, path: &str, mut body: Value) -> Vec<(String, Value)> {
    body["stream"] = Value::from(true);
    let response = server.send(path, &body).await;
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    let text = response.text().await.unwrap();
    let events = text.split("\n\n").filter(|event| !event.trim().is_empty());
    let event = |event: &str| {
        let mut lines = event.lines();
        let mut field = |name: &str| lines.next().unwrap().strip_prefix(name).unwrap().to_owned();
        let name = field("event: ");
        let data: Value = serde_json::from_str(&field("data: ")).unwrap();
        assert_eq!(data["type"], *name, "{data}");
        (name, data)
    };
    events.map(event).collect()
}

/// The names alone.
pub fn names(events: &[(String, Value)]) -> Vec<&str> {
    events.iter().map(|(name, _)| name.as_str()).collect()
}
