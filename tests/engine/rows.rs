//! What a step sends to the host: the drawn tokens, never a whole row of logits, unless a request asks for rows.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use crate::engine_harness::{
    BLOCK, OPTIONS, Outcomes, drawn, engine_on, finish, limits, request, tokens,
};
use kimi_linear::backend::cuda::CudaBackend;
use kimi_linear::backend::cuda::machine::{Answers, Buffer, Machine, Memory, Work};
use kimi_linear::backend::{Device, Result, Ticket};
use kimi_linear::engine::{Engine, PromptScores, Request, RequestId, Sampling};
use kimi_linear_emulated::Order;

/// Bytes of a row of logits of tiny-a.
const ROW: usize = 512 * size_of::<f32>();

/// A machine that counts the bytes that each step reads back.
struct Counting {
    inner: Arc<dyn Machine>,
    steps: Arc<AtomicUsize>,
    most: Arc<Mutex<usize>>,
}

impl Machine for Counting {
    fn device(&self) -> &Device {
        self.inner.device()
    }

    fn allocate(&self, what: &str, bytes: u64) -> Result<Box<dyn Memory>> {
        self.inner.allocate(what, bytes)
    }

    fn write(&self, buffer: &Buffer, start: u64, bytes: &[u8]) -> Result<()> {
        self.inner.write(buffer, start, bytes)
    }

    fn submit(&self, work: &Work<'_>) -> Result<Ticket<Answers>> {
        let ticket = self.inner.submit(work)?;
        // Other submissions read states and latents, which preemption and snapshots move.
        if work.upload.is_none() || work.commands.is_empty() {
            return Ok(ticket);
        }
        self.steps.fetch_add(1, Ordering::Relaxed);
        let most = Arc::clone(&self.most);
        Ok(Ticket::new(async move {
            let answers = ticket.await?;
            let mut most = most.lock().unwrap();
            *most = most.max(answers.bytes.len());
            Ok(answers)
        }))
    }

    fn forget(&self, step: u64) {
        self.inner.forget(step);
    }
}

/// Runs requests together; the number of steps, and the most bytes that one of them read back.
fn counted(requests: Vec<Request>) -> (usize, usize) {
    let (steps, most) = (Arc::default(), Arc::default());
    let machine = Counting {
        inner: crate::emulated::machine(&[Order::Forward]),
        steps: Arc::clone(&steps),
        most: Arc::clone(&most),
    };
    let backend = Box::new(CudaBackend::over(Arc::new(machine)));
    let mut engine: Engine = engine_on(backend, "tiny-a", limits(4, 8, 32), OPTIONS);
    for (id, request) in (0..).zip(requests) {
        engine.submit(RequestId(id), request).unwrap();
    }
    let mut outcomes = Outcomes::new();
    finish(&mut engine, &mut outcomes);
    assert!(outcomes.values().all(|outcome| outcome.error.is_none()));
    let most = *most.lock().unwrap();
    (steps.load(Ordering::Relaxed), most)
}

#[test]
fn no_row_of_logits_is_read_back_for_a_drawn_token() {
    let with = |seed: u64, sampling: Sampling, logprobs| Request {
        sampling,
        logprobs,
        ..request(tokens(seed, BLOCK + 3), 4)
    };
    let penalised = Sampling {
        presence_penalty: 0.5,
        frequency_penalty: 0.5,
        repetition_penalty: 1.2,
        logit_bias: vec![(7, 1.0)],
        min_p: 0.01,
        ..drawn(3)
    };
    let (steps, most) = counted(vec![
        with(1, drawn(1), None),
        with(2, Sampling::GREEDY, Some(5)),
        with(3, penalised, None),
        Request {
            samples: 2,
            ..with(4, drawn(4), Some(1))
        },
    ]);
    assert!(steps > 4, "{steps} steps");
    assert!(most > 0, "no step has read anything back");
    assert!(
        most < ROW,
        "{most} bytes of four rows, which have {ROW} each"
    );
}

#[test]
fn rows_are_read_back_for_a_request_for_logits() {
    let scored = Request {
        scores: PromptScores::Logits,
        ..request(tokens(1, BLOCK), 1)
    };
    let (_, most) = counted(vec![scored]);
    assert!(most >= BLOCK * ROW, "{most} bytes");
}
