//! Errors on their way: an engine's as Dynamo's, so that Dynamo tries again where that helps, and back.

use std::error::Error as StdError;

use dynamo_backend_common::{BackendError, DynamoError, ErrorType};
use kimi_linear::Error;
use kimi_linear::error::EngineError;

/// The error as Dynamo understands it. Invalid requests are refused; a full queue makes Dynamo try another worker, or answer 503; an
/// engine or a peer that was lost makes the request migrate.
#[must_use]
pub fn dynamo_error(error: &Error) -> DynamoError {
    let message = error.to_string();
    DynamoError::builder()
        .error_type(kind(error))
        // The client sees it: it says what is wrong with the request, and has nothing of its content.
        .public_message(message.clone())
        .message(message)
        .build()
}

fn kind(error: &Error) -> ErrorType {
    match error {
        Error::Failed(error) => kind(error),
        Error::Engine(error) => engine_kind(error),
        // The peer of a transfer; a request that migrates is prefilled again.
        Error::Transfer(_) => ErrorType::Backend(BackendError::Disconnected),
        // A device that failed: all requests of this worker do.
        Error::Backend(_) => ErrorType::Backend(BackendError::EngineShutdown),
        Error::Tokenizer(_) => ErrorType::Backend(BackendError::InvalidArgument),
        _ => ErrorType::Backend(BackendError::Unknown),
    }
}

fn engine_kind(error: &EngineError) -> ErrorType {
    match error {
        EngineError::EmptyPrompt
        | EngineError::PromptTooLong { .. }
        | EngineError::TokenOutOfRange { .. }
        | EngineError::Sampling { .. }
        | EngineError::BiasOutOfRange { .. }
        | EngineError::TurnOutOfRange { .. }
        | EngineError::Undo { .. }
        | EngineError::UndoTransfer
        | EngineError::EmptyStop
        | EngineError::NoRoomToScore { .. }
        | EngineError::DoesNotFit { .. }
        | EngineError::Grammar { .. }
        | EngineError::BatchTooLarge { .. }
        | EngineError::NotRemote { .. }
        | EngineError::PromptCut { .. }
        | EngineError::Refused { .. } => ErrorType::Backend(BackendError::InvalidArgument),
        EngineError::QueueFull { .. } => ErrorType::WorkerOverloaded,
        EngineError::Stopped | EngineError::NoThread { .. } => {
            ErrorType::Backend(BackendError::EngineShutdown)
        }
        EngineError::Unavailable { .. }
        | EngineError::TransferCancelled
        | EngineError::HandOff { .. }
        | EngineError::HandOffMisplaced { .. }
        | EngineError::UnknownImport { .. }
        | EngineError::ImportIncomplete { .. } => ErrorType::Backend(BackendError::Disconnected),
        _ => ErrorType::Backend(BackendError::Unknown),
    }
}

/// The engine's error for an error that came through Dynamo: [`EngineError::Refused`] for a request that no worker can answer,
/// [`EngineError::Unavailable`] for workers that are missing, full or lost.
#[must_use]
pub fn engine_error(error: &(dyn StdError + 'static)) -> EngineError {
    let mut found: Option<&DynamoError> = None;
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(error) = error.downcast_ref::<DynamoError>() {
            // The deepest one is the worker's own; those around it tell what the router made of it.
            if error.class() != ErrorType::Internal || found.is_none() {
                found = Some(error);
            }
        }
        next = error.source();
    }
    let reason = found.map_or_else(|| error.to_string(), message);
    match found.map(DynamoError::class) {
        Some(
            ErrorType::InvalidRequest
            | ErrorType::PayloadTooLarge
            | ErrorType::UnsupportedMedia
            | ErrorType::NotImplemented,
        ) => EngineError::Refused { reason },
        _ => EngineError::Unavailable { reason },
    }
}

/// What a client may read of it.
fn message(error: &DynamoError) -> String {
    match (error.public_message(), error.message()) {
        (Some(message), _) => message.to_owned(),
        (None, "") => error.to_string(),
        (None, message) => message.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kimi_linear::error::TransferError;
    use std::sync::Arc;

    fn there_and_back(error: &DynamoError) -> EngineError {
        // As it comes over the network.
        let sent = serde_json::to_string(error).unwrap();
        engine_error(&serde_json::from_str::<DynamoError>(&sent).unwrap())
    }

    #[test]
    fn invalid_requests_are_refused_with_their_reason() {
        let error = Error::from(EngineError::EmptyPrompt);
        let sent = dynamo_error(&Error::Failed(Arc::new(error)));
        assert_eq!(sent.class(), ErrorType::InvalidRequest);
        let back = there_and_back(&sent);
        assert!(
            matches!(&back, EngineError::Refused { reason } if reason.contains("the prompt is empty")),
            "{back:?}"
        );
    }

    #[test]
    fn what_another_worker_may_do_better_is_tried_there() {
        let full = dynamo_error(&EngineError::QueueFull { waiting: 3 }.into());
        assert_eq!(full.error_type(), ErrorType::WorkerOverloaded);
        let lost = dynamo_error(&TransferError::Closed.into());
        assert_eq!(
            lost.error_type(),
            ErrorType::Backend(BackendError::Disconnected)
        );
        let stopped = dynamo_error(&EngineError::Stopped.into());
        let shutdown = ErrorType::Backend(BackendError::EngineShutdown);
        assert_eq!(stopped.error_type(), shutdown);
        for error in [full, lost, stopped] {
            let back = there_and_back(&error);
            assert!(matches!(back, EngineError::Unavailable { .. }), "{back:?}");
        }
    }

    #[test]
    fn the_workers_own_error_is_found_below_the_routers() {
        let refused = dynamo_error(&EngineError::EmptyPrompt.into());
        let around = DynamoError::builder()
            .error_type(ErrorType::CannotConnect)
            .message("no response stream")
            .cause(refused)
            .build();
        let back = engine_error(&around);
        assert!(matches!(back, EngineError::Refused { .. }), "{back:?}");
        let other = std::io::Error::other("cut off");
        let back = engine_error(&other).to_string();
        assert_eq!(back, "cut off");
    }
}
