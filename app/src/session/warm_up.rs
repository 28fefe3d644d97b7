//! A first answer that nobody sees, before a model counts as loaded: a GPU compiles its programs for it.

use kimi_linear::backend::Backend;
use kimi_linear::engine::{Event, Request};
use kimi_linear::error::Error;
use kimi_linear::llm::Llm;
use kimi_linear::model::TraceChoice;

use super::{LIKELY, Teller, Update, host};

/// Tokens of the prompt that are computed together.
const TOGETHER: usize = 16;

/// Has a device report how much of what it was asked for is done.
pub(super) fn report(backend: &mut dyn Backend, teller: &Teller) {
    let teller = teller.clone();
    backend.report_confirmed(Box::new(move |done, total| {
        teller.tell(Update::Preparing { done, total });
    }));
}

/// Answers a short prompt with the programs of a question: tokens of the prompt that are computed together, a traced one, and one
/// of the answer. On the CPU nothing is compiled.
///
/// # Errors
/// A shader that the device refuses, or a device that fails.
pub(super) async fn warm_up(llm: &Llm, choice: TraceChoice) -> Result<(), Error> {
    if llm.device().backend == "cpu" {
        return Ok(());
    }
    let request = Request {
        trace: Some(choice),
        trace_from: Some(TOGETHER),
        logprobs: Some(LIKELY),
        ..Request::new(vec![0; TOGETHER + 1], 2)
    };
    let answer = llm.engine().answer(request);
    while let Some(event) = host::next(&answer).await {
        if let Event::Failed(error) = event {
            return Err(Error::Failed(error));
        }
    }
    Ok(())
}
