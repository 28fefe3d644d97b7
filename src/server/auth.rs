//! Keys: where the server has some, a request must bring one as `Authorization: Bearer KEY`, or as `x-api-key: KEY`, which
//! is Anthropic's way.

use axum::http::{HeaderMap, HeaderName, HeaderValue, header};

use super::error::{ApiError, Result};

const API_KEY: HeaderName = HeaderName::from_static("x-api-key");

/// Refuses a request without one of these keys; without keys everybody may.
pub(super) fn check(keys: &[String], headers: &HeaderMap) -> Result<()> {
    if keys.is_empty() {
        return Ok(());
    }
    let bearer = headers.get(header::AUTHORIZATION);
    let bare = headers.get(API_KEY);
    if bearer.is_none() && bare.is_none() {
        let message =
            "an API key is needed: send it as `Authorization: Bearer KEY` or `x-api-key: KEY`";
        return Err(ApiError::unauthorized(message));
    }
    let bearer = bearer
        .and_then(|given| given.as_bytes().split_at_checked(7))
        .filter(|(scheme, _)| scheme.eq_ignore_ascii_case(b"bearer "))
        .map(|(_, given)| given);
    // All keys are compared, whichever fits.
    let given = [bearer, bare.map(HeaderValue::as_bytes)]
        .into_iter()
        .flatten();
    let fits = given
        .flat_map(|given| keys.iter().map(move |key| same(key.as_bytes(), given)))
        .fold(false, |fits, same| fits | same);
    if fits {
        return Ok(());
    }
    Err(ApiError::unauthorized(
        "the key is not one of this server's",
    ))
}

/// Whether two keys are the same, in a time that does not tell how much of them is.
fn same(key: &[u8], given: &[u8]) -> bool {
    let difference = key.len() ^ given.len();
    let bytes = (0..given.len()).fold(0, |difference, at| {
        difference | (key.get(at).copied().unwrap_or(!given[at]) ^ given[at])
    });
    difference == 0 && std::hint::black_box(bytes) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(value: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(header::AUTHORIZATION, value.parse().unwrap());
        headers
    }

    #[test]
    fn only_a_key_of_the_servers_opens() {
        let keys = ["one".to_owned(), "another".to_owned()];
        for good in ["Bearer one", "bearer another"] {
            assert!(check(&keys, &with(good)).is_ok(), "{good}");
        }
        for bad in [
            "one",
            "Bearer",
            "Bearer ",
            "Bearer on",
            "Bearer onee",
            "Basic one",
            "Bearer  one",
        ] {
            assert!(check(&keys, &with(bad)).is_err(), "{bad}");
        }
        let mut bare = HeaderMap::new();
        bare.insert(API_KEY, HeaderValue::from_static("another"));
        assert!(check(&keys, &bare).is_ok());
        bare.insert(API_KEY, HeaderValue::from_static("Bearer another"));
        assert!(check(&keys, &bare).is_err());
        assert!(check(&keys, &HeaderMap::new()).is_err());
        assert!(check(&[], &HeaderMap::new()).is_ok());
    }
}
