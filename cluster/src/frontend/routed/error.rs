//! Errors of Dynamo's pipeline as the engine's.

use std::error::Error as StdError;

use dynamo_kv_router::scheduling::KvSchedulerError;
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

/// The error of Dynamo's choice of a worker among the causes.
fn scheduling<'a>(error: &'a (dyn StdError + 'static)) -> Option<&'a KvSchedulerError> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref() {
            return Some(found);
        }
        next = error.source();
    }
    None
}

/// The engine's error. `running` is the number of requests that are under way.
pub(super) fn engine_error(error: &(dyn StdError + 'static), running: usize) -> EngineError {
    if is_of(error, ErrorClass::CapacityExhausted) {
        return EngineError::QueueFull { waiting: running };
    }
    if matches!(scheduling(error), Some(KvSchedulerError::NoEndpoints)) {
        return lost(
            "no worker can be reached at the moment: those that are registered have just failed",
        );
    }
    wire::engine_error(error)
}

/// Whether a request that has failed may succeed when it is sent again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Again {
    /// It would fail again.
    Never,
    /// The worker is full, and another may not be.
    Elsewhere,
    /// The worker is lost, and the router puts it aside.
    Soon,
    /// No worker is there at the moment: workers come and go.
    Later,
}

/// Reasons after which another try is of no use, whatever else an error tells.
const FINAL: &[&str] = &["request.deadline_exceeded"];

/// The reason of a worker that is full.
const FULL: &str = "capacity.worker_overloaded";

/// Whether a request with this error may succeed when it is sent again.
pub(super) fn again(error: &(dyn StdError + 'static)) -> Again {
    match scheduling(error) {
        Some(KvSchedulerError::NoEndpoints | KvSchedulerError::SubscriberShutdown) => {
            return Again::Later;
        }
        // Of an id that is in use: the next one is another.
        Some(KvSchedulerError::BookingFailed(_)) => return Again::Soon,
        _ => {}
    }
    let mut found = Again::Never;
    let mut next = Some(error);
    while let Some(error) = next {
        next = error.source();
        let Some(error) = error.downcast_ref::<DynamoError>() else {
            continue;
        };
        let reason = error.reason().as_str();
        let told = match error.class() {
            _ if FINAL.contains(&reason) => return Again::Never,
            ErrorClass::CapacityExhausted if reason == FULL => Again::Elsewhere,
            ErrorClass::InvalidRequest | ErrorClass::Cancelled | ErrorClass::CapacityExhausted => {
                return Again::Never;
            }
            ErrorClass::Unavailable | ErrorClass::DeadlineExceeded => Again::Soon,
            _ => continue,
        };
        if found == Again::Never {
            found = told;
        }
    }
    found
}

/// An answer whose worker was lost.
pub(super) fn lost(what: &str) -> EngineError {
    EngineError::Unavailable {
        reason: what.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dynamo_runtime::error::{BackendError, ErrorType};

    fn error(kind: ErrorType) -> DynamoError {
        DynamoError::builder().error_type(kind).message("m").build()
    }

    #[test]
    fn lost_workers_are_replaced_and_full_ones_passed_over() {
        for (kind, expected) in [
            (ErrorType::Disconnected, Again::Soon),
            (ErrorType::CannotConnect, Again::Soon),
            (ErrorType::ResponseTimeout, Again::Soon),
            (ErrorType::WorkerUnavailable, Again::Soon),
            (
                ErrorType::Backend(BackendError::EngineShutdown),
                Again::Soon,
            ),
            (ErrorType::WorkerOverloaded, Again::Elsewhere),
            (ErrorType::ResourceExhausted, Again::Never),
            (ErrorType::InvalidRequest, Again::Never),
            (ErrorType::Cancelled, Again::Never),
            (ErrorType::DeadlineExceeded, Again::Never),
            (ErrorType::Backend(BackendError::Unknown), Again::Never),
        ] {
            assert_eq!(again(&error(kind)), expected, "{kind}");
        }
        // What a worker refuses is refused, whatever the router makes of it.
        let around = DynamoError::builder().error_type(ErrorType::Disconnected);
        let around = around.message("m").cause(error(ErrorType::InvalidRequest));
        assert_eq!(again(&around.build()), Again::Never);
        assert_eq!(again(&std::io::Error::other("m")), Again::Never);
        // The router has put the last one aside.
        let error = anyhow::Error::from(KvSchedulerError::NoEndpoints);
        assert_eq!(again(error.as_ref()), Again::Later);
        let text = engine_error(error.as_ref(), 0).to_string();
        assert!(text.contains("have just failed"), "{text}");
    }
}
