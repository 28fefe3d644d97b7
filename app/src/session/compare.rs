//! Answers with a token's write in the state and without it, side by side.

use std::sync::Arc;

use kimi_linear::engine::{EngineHandle, Event, Request, UndoWrite};
use kimi_linear::error::Error;
use kimi_linear::tokenizer::Tokenizer;

use super::host;

/// The greedy answers to a prompt, as it is and with a write undone. Both run at once.
///
/// # Errors
/// A request that is refused, or a device that fails.
pub(super) async fn answers(
    engine: &EngineHandle,
    tokenizer: &Tokenizer,
    request: Request,
    write: UndoWrite,
) -> Result<[String; 2], Arc<Error>> {
    let kept = engine.answer(request.clone());
    let without = engine.answer(Request {
        undo: vec![write],
        ..request
    });
    let mut texts = [String::new(), String::new()];
    for (answer, text) in [kept, without].into_iter().zip(&mut texts) {
        let mut ids = Vec::new();
        while let Some(event) = host::next(&answer).await {
            match event {
                Event::Token { id, .. } => ids.push(id),
                Event::Failed(error) => return Err(error),
                _ => {}
            }
        }
        *text = tokenizer
            .decode(&ids)
            .map_err(|error| Arc::new(Error::from(error)))?;
    }
    tracing::info!(token = write.token, "answered with a write undone");
    Ok(texts)
}
