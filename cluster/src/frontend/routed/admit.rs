//! Takes requests: all that come together, or none.

use std::ops::ControlFlow;
use std::sync::Arc;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use kimi_linear::engine::{Event, FinishReason, Request, Usage};
use kimi_linear::error::EngineError;

use super::Client;
use super::answer::Answer;
use super::send::{Stopped, send};
use super::shared::Shared;

/// Sends requests that came together, and starts a task for each answer.
pub(super) async fn run(client: Arc<Client>, submitted: Vec<(Request, Arc<Shared>)>) {
    match admit(&client, &submitted).await {
        Ok(answers) => {
            for (_, shared) in &submitted {
                // One that the client has cancelled ends below, or has no answer that began.
                let _: ControlFlow<()> = shared.send(Event::Queued { ahead: 0 });
            }
            let begun: Vec<_> = answers
                .iter()
                .map(|answer| (answer.shared().id(), answer.sample()))
                .collect();
            for (request, shared) in &submitted {
                for sample in 0..shared.samples() {
                    if !begun.contains(&(shared.id(), sample)) {
                        shared.finish(sample, FinishReason::Cancelled, usage(request));
                    }
                }
            }
            for answer in answers {
                tokio::spawn(answer.run());
            }
        }
        Err(error) => {
            for (_, shared) in &submitted {
                shared.fail(error.clone());
            }
        }
    }
}

/// The usage of an answer that was not begun.
fn usage(request: &Request) -> Usage {
    Usage {
        prompt_tokens: request.prompt.len() - request.answered,
        ..Usage::default()
    }
}

/// Sends all answers of all requests. Those of cancelled requests are missing from what is returned.
async fn admit(
    client: &Client,
    submitted: &[(Request, Arc<Shared>)],
) -> Result<Vec<Answer>, EngineError> {
    // Without workers there is nothing to wait for.
    client.route.route()?;
    let mut answers = Vec::new();
    let mut sending = FuturesUnordered::new();
    for (request, shared) in submitted {
        for sample in 0..shared.samples() {
            sending.push(begin(client, request, sample, Arc::clone(shared)));
        }
    }
    while let Some(sent) = sending.next().await {
        match sent {
            Ok(answer) => answers.push(answer),
            Err(Stopped::GivenUp) => {}
            // What was sent already is stopped when it is dropped.
            Err(Stopped::Failed(error)) => return Err(error),
        }
    }
    Ok(answers)
}

/// Sends one answer of a request.
async fn begin(
    client: &Client,
    request: &Request,
    sample: usize,
    shared: Arc<Shared>,
) -> Result<Answer, Stopped> {
    let part = Request {
        samples: 1,
        first_sample: request.first_sample + sample,
        ..request.clone()
    };
    let chunks = send(client, &part, &shared).await?;
    Ok(Answer::new(shared, sample, part, chunks))
}
