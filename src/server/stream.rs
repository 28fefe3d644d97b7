//! Server-sent events: `data: JSON`, one a chunk, and `data: [DONE]` at the end.

use std::convert::Infallible;
use std::time::Duration;

use axum::http::{HeaderValue, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};

/// The last event of a stream that came to its end.
pub(super) const DONE: &str = "[DONE]";

/// A comment comes where nothing else has for so long, so that proxies keep the connection.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// Where a stream's data comes from.
pub(super) trait Source: Send + 'static {
    /// Done once, before the first.
    fn start(&mut self);

    /// The next data; nothing after the last.
    fn next(&mut self) -> impl Future<Output = Option<String>> + Send;
}

/// A response that sends what comes.
pub(super) fn respond(mut source: impl Source) -> Response {
    source.start();
    let events = futures_util::stream::unfold(source, |mut source| async {
        let data = source.next().await?;
        Some((Ok::<_, Infallible>(Event::default().data(data)), source))
    });
    let mut response = Sse::new(events)
        .keep_alive(KeepAlive::new().interval(KEEP_ALIVE))
        .into_response();
    // nginx would hold the events back.
    response
        .headers_mut()
        .insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
        .headers_mut()
        .insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    response
}
