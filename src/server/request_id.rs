//! Request ids: the client's own from `x-request-id`, or a new one. It is returned in the same header, and is part of the ids
//! of answers and of log lines.

use axum::extract::Request;
use axum::http::{HeaderName, HeaderValue};
use axum::middleware::Next;
use axum::response::Response;

pub(super) const HEADER: HeaderName = HeaderName::from_static("x-request-id");

/// Maximum length of an id in characters.
const LENGTH: usize = 128;

/// A request's id.
#[derive(Clone, Debug)]
pub(super) struct Id(pub(super) String);

/// Assigns an id to every request.
pub(super) async fn name(mut request: Request, next: Next) -> Response {
    let own = request.headers().get(HEADER);
    let own = own.and_then(|id| id.to_str().ok()).filter(|id| {
        (1..=LENGTH).contains(&id.len()) && id.bytes().all(|byte| byte.is_ascii_graphic())
    });
    let id = own.map_or_else(|| format!("{:032x}", rand::random::<u128>()), str::to_owned);
    request.extensions_mut().insert(Id(id.clone()));
    let mut response = next.run(request).await;
    if let Ok(value) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(HEADER, value);
    }
    response
}
