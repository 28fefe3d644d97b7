//! Errors of Dynamo's pipeline as the engine's.

use std::error::Error as StdError;

use dynamo_runtime::error::{DynamoError, ErrorClass};
use kimi_linear::error::EngineError;

use crate::wire;

/// Whether an error or one of its causes is of this class.
fn is_of(error: &(dyn StdError + 'static), class: ErrorClass) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        let found = error.downcast_ref::<DynamoError>();
        if found.is_some_and(|error| error.class() == class) {
            return true;
        }
        next = error.source();
    }
    false
}

/// The engine's error. `running` is the number of requests that are under way.
pub(super) fn engine_error(error: &(dyn StdError + 'static), running: usize) -> EngineError {
    if is_of(error, ErrorClass::CapacityExhausted) {
        return EngineError::QueueFull { waiting: running };
    }
    wire::engine_error(error)
}

/// Whether another try may succeed soon, because workers come and go: no worker has taken the request.
pub(super) fn is_passing(error: &(dyn StdError + 'static)) -> bool {
    is_of(error, ErrorClass::Unavailable)
        && !is_of(error, ErrorClass::InvalidRequest)
        && !is_of(error, ErrorClass::CapacityExhausted)
}

/// An answer whose worker was lost.
pub(super) fn lost(what: &str) -> EngineError {
    EngineError::Unavailable {
        reason: what.to_owned(),
    }
}
