//! Server-sent events: `data: JSON`, with an `event: NAME` before it in the protocols that name theirs.

use std::convert::Infallible;
use std::time::Duration;

use axum::http::{HeaderValue, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::{Stream, StreamExt};
use serde_json::{Map, Value};

/// A comment, or what a protocol has for it, comes where nothing else has for so long, so that proxies keep the connection.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// One event.
pub(super) struct Data {
    name: Option<&'static str>,
    data: String,
}

impl Data {
    pub(super) fn unnamed(data: String) -> Self {
        Self { name: None, data }
    }

    /// An event that says its name in its data's `type` too.
    pub(super) fn named(name: &'static str, fields: Value) -> Self {
        let mut data = Map::from_iter([("type".to_owned(), Value::from(name))]);
        if let Value::Object(fields) = fields {
            data.extend(fields);
        }
        Self {
            name: Some(name),
            data: Value::Object(data).to_string(),
        }
    }

    /// The event on its way out.
    pub(super) fn event(self) -> Event {
        let event = Event::default();
        let event = match self.name {
            Some(name) => event.event(name),
            None => event,
        };
        event.data(self.data)
    }
}

/// A response that sends what comes.
pub(super) fn respond(
    data: impl Stream<Item = Data> + Send + 'static,
    keep_alive: KeepAlive,
) -> Response {
    let events = data.map(|data| Ok::<_, Infallible>(data.event()));
    let mut response = Sse::new(events)
        .keep_alive(keep_alive.interval(KEEP_ALIVE))
        .into_response();
    let headers = response.headers_mut();
    // nginx would hold the events back.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    response
}
