//! Which web pages may send requests: a browser sends what any page asks for, with the rights of its user.
//!
//! Only pages of the allowed origins can read answers (CORS). Requests from pages of other origins are refused as well: otherwise
//! one sent as plain text would be answered, although the page could not read the answer. A server without a key that listens on
//! this machine only accepts requests whose host is a name of this machine: a page can make its own name resolve to 127.0.0.1
//! (DNS rebinding), and would then have the same origin.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, header};
use axum::middleware::Next;
use axum::response::Response;
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};

use super::error::{ApiError, Result};
use super::fields::shorten;
use super::options::Origins;
use super::request_id;
use super::response;
use super::routes::Shared;

/// Which pages may read answers.
pub(super) fn cors(origins: &Origins) -> CorsLayer {
    let allowed = match origins {
        Origins::Any => AllowOrigin::any(),
        Origins::Local => AllowOrigin::predicate(|origin, _| is_local(origin)),
        Origins::These(these) => {
            let these = these
                .iter()
                .filter_map(|origin| HeaderValue::from_str(origin).ok());
            AllowOrigin::list(these)
        }
    };
    CorsLayer::new()
        .allow_origin(allowed)
        .allow_methods([Method::GET, Method::POST, Method::DELETE])
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers([
            request_id::HEADER,
            header::RETRY_AFTER,
            response::SCHEMA_VIOLATION,
        ])
        .max_age(Duration::from_secs(600))
}

/// Refuses requests that a page of an origin that is not allowed may have sent.
pub(super) async fn guard(
    State(shared): State<Arc<Shared>>,
    request: Request,
    next: Next,
) -> Result<Response> {
    let (headers, options) = (request.headers(), &shared.options);
    // A page cannot know the key, so a request with a key is not forged by a page.
    if options.api_keys.is_empty() {
        if shared.local {
            check_host(host(&request), &options.hosts)?;
        }
        if [Method::POST, Method::DELETE].contains(request.method()) {
            check_origin(headers, host(&request), &options.origins)?;
        }
    }
    if request.method() == Method::POST {
        check_content_type(headers)?;
    }
    Ok(next.run(request).await)
}

/// The host that the request names.
fn host(request: &Request) -> Option<&str> {
    let own = request.headers().get(header::HOST);
    let own = own.map(|host| host.to_str().unwrap_or_default());
    own.or_else(|| {
        request
            .uri()
            .authority()
            .map(|authority| authority.as_str())
    })
}

fn check_host(host: Option<&str>, allowed: &[String]) -> Result<()> {
    let Some(host) = host else { return Ok(()) };
    let name = name_of(host);
    let known = allowed
        .iter()
        .any(|own| own == "*" || own.eq_ignore_ascii_case(name));
    if known || is_this_machine(name) {
        return Ok(());
    }
    let message = format!(
        "this server is for this machine, and knows no host `{}`; --allowed-hosts names others, and with --api-key any may be",
        shorten(host)
    );
    Err(ApiError::forbidden(message).code("host_not_allowed"))
}

fn check_origin(headers: &HeaderMap, host: Option<&str>, allowed: &Origins) -> Result<()> {
    let Some(origin) = headers.get(header::ORIGIN) else {
        return Ok(());
    };
    let text = origin.to_str().unwrap_or_default();
    let authority = text.split_once("://").map(|(_, authority)| authority);
    let allowed = match allowed {
        Origins::Any => true,
        Origins::Local => is_local(origin),
        Origins::These(these) => these.iter().any(|own| own == text),
    };
    if allowed || (authority.is_some() && authority == host) {
        return Ok(());
    }
    let message = format!(
        "pages of `{}` may not ask this server; --allowed-origins names those that may",
        shorten(text)
    );
    Err(ApiError::forbidden(message).code("origin_not_allowed"))
}

/// Refuses a body with a content type other than JSON: a page may send plain text to any server without a preflight request.
fn check_content_type(headers: &HeaderMap) -> Result<()> {
    let Some(kind) = headers.get(header::CONTENT_TYPE) else {
        return Ok(());
    };
    let kind = kind.to_str().unwrap_or_default();
    let media = kind
        .split(';')
        .next()
        .unwrap_or_default()
        .trim()
        .to_ascii_lowercase();
    if media == "application/json" || media.ends_with("+json") {
        return Ok(());
    }
    let message = format!(
        "the body must be sent with `Content-Type: application/json`, found `{}`",
        shorten(kind)
    );
    Err(ApiError::media_type(message))
}

/// Whether an origin is a page of this machine.
fn is_local(origin: &HeaderValue) -> bool {
    let origin = origin.to_str().ok();
    let authority = origin.and_then(|text| text.split_once("://"));
    authority.is_some_and(|(_, authority)| is_this_machine(name_of(authority)))
}

/// The name in `NAME:PORT`.
fn name_of(authority: &str) -> &str {
    match authority.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => host,
        _ => authority,
    }
}

fn is_this_machine(name: &str) -> bool {
    let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
    let address = name.trim_start_matches('[').trim_end_matches(']');
    name == "localhost"
        || name.ends_with(".localhost")
        || address
            .parse::<std::net::IpAddr>()
            .is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_of_this_machine_are_known() {
        let local = |origin: &str| is_local(&HeaderValue::from_str(origin).unwrap());
        for origin in [
            "http://localhost",
            "http://localhost:3000",
            "https://127.0.0.1:8443",
            "http://[::1]:80",
            "http://[::1]",
        ] {
            assert!(local(origin), "{origin}");
        }
        for origin in [
            "null",
            "http://localhost.example.org",
            "http://example.org",
            "http://10.0.0.1",
            "http://127.0.0.1.example.org",
        ] {
            assert!(!local(origin), "{origin}");
        }
    }

    #[test]
    fn hosts_are_this_machines_or_named() {
        let named = ["models.example".to_owned()];
        for good in [
            "localhost:8000",
            "LOCALHOST",
            "app.localhost:1",
            "127.0.0.1",
            "[::1]:8000",
            "models.example:443",
        ] {
            assert!(check_host(Some(good), &named).is_ok(), "{good}");
        }
        for bad in [
            "evil.example",
            "",
            "localhost.evil.example:8000",
            "10.0.0.1",
        ] {
            assert!(check_host(Some(bad), &named).is_err(), "{bad}");
        }
        assert!(check_host(Some("any.example"), &["*".to_owned()]).is_ok());
        assert!(check_host(None, &[]).is_ok());
    }
}
