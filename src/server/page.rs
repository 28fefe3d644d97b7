//! Pages for people who open the server's address in a browser: a chat, three static files over the API that all other clients
//! use, and the OpenAPI document in a readable form.

use axum::http::{HeaderName, header};
use axum::response::{IntoResponse, Response};

/// Content security policy: scripts and styles from this server only, and no embedding in frames of other pages.
const POLICY: &str = "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'self'";

fn file(kind: &'static str, text: &'static str) -> Response {
    let headers: [(HeaderName, &str); 4] = [
        (header::CONTENT_TYPE, kind),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::CACHE_CONTROL, "no-cache"),
    ];
    (headers, text).into_response()
}

/// The HTML.
pub(super) async fn index() -> Response {
    file("text/html; charset=utf-8", include_str!("page/index.html"))
}

/// The CSS.
pub(super) async fn style() -> Response {
    file("text/css; charset=utf-8", include_str!("page/chat.css"))
}

/// The page that shows the OpenAPI document.
pub(super) async fn docs() -> Response {
    file("text/html; charset=utf-8", include_str!("page/docs.html"))
}

/// What that page does.
pub(super) async fn docs_script() -> Response {
    file(
        "text/javascript; charset=utf-8",
        include_str!("page/docs.js"),
    )
}

/// What it does.
pub(super) async fn script() -> Response {
    file(
        "text/javascript; charset=utf-8",
        include_str!("page/chat.js"),
    )
}
