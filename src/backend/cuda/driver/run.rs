//! Runs commands on the stream: one by one, or as a graph of commands that ran before.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context as TaskContext, Poll};

use cudarc::driver::sys;
use cudarc::driver::{CudaEvent, CudaGraph, CudaStream};

use super::graphs::{Graphs, Runner};
use super::launch::{early_launches_wanted, launch, with_early};
use super::memory::{self, DeviceMemory};
use super::modules::Functions;
use super::nccl::Ranks;
use super::product::Products;
use super::{Pinned, Spare, driver_call};
use crate::backend::cuda::machine::NO_STEP;
use crate::backend::cuda::machine::{Answers, Buffer, Command, Launch, Work};
use crate::backend::{Result, await_device};
use crate::error::BackendError;

/// The objects that enqueue commands.
struct Queue {
    stream: Arc<CudaStream>,
    functions: Functions,
    products: Products,
    ranks: Arc<Ranks>,
    /// Whether kernels may start before those in front of them have ended.
    early: bool,
}

pub(super) struct State {
    // Before the queue, so that graphs are dropped first: they use its functions.
    graphs: Graphs<CudaGraph>,
    queue: Queue,
}

// SAFETY: graphs and cuBLASLt's handles may be used from any thread, one at a time; they are behind the driver's lock.
unsafe impl Send for State {}

/// Whether CUDA graphs are enabled: yes, unless `KIMI_LINEAR_GRAPHS` is `0`.
fn graphs_wanted() -> bool {
    std::env::var_os("KIMI_LINEAR_GRAPHS").is_none_or(|value| value != "0")
}

impl State {
    /// Loads every kernel and opens cuBLASLt, so that missing files are reported before a model is loaded.
    pub(super) fn new(
        stream: &Arc<CudaStream>,
        ranks: &Arc<Ranks>,
        capability: (i32, i32),
        driver: i32,
    ) -> Result<Self> {
        Ok(Self {
            graphs: Graphs::new(graphs_wanted()),
            queue: Queue {
                stream: Arc::clone(stream),
                products: Products::new(stream)?,
                ranks: Arc::clone(ranks),
                functions: Functions::load(stream.context(), capability, driver)?,
                early: early_launches_wanted(),
            },
        })
    }

    pub(super) fn forget(&mut self, step: u64) {
        self.graphs.forget(step);
    }

    pub(super) fn forget_all(&mut self) {
        self.graphs.forget_all();
    }

    pub(super) fn submit(&mut self, spare: &Arc<Spare>, work: &Work<'_>) -> Result<Pending> {
        let mut pending = Pending {
            spare: Arc::clone(spare),
            upload: None,
            answers: None,
            event: None,
            marks: Vec::new(),
            awaited: false,
        };
        let enqueued = self.enqueue(work, &mut pending);
        // Enqueued work may still use the pinned memory: it is kept until this event.
        match self.queue.mark(work.timed.is_some()) {
            Ok(event) => pending.event = Some(Arc::new(event)),
            Err(error) => {
                // Its error does not matter, only that nothing runs afterwards.
                let _ = self.queue.stream.synchronize();
                return Err(enqueued.err().unwrap_or(error));
            }
        }
        enqueued?;
        Ok(pending)
    }

    fn enqueue(&mut self, work: &Work<'_>, pending: &mut Pending) -> Result<()> {
        if let Some((buffer, bytes)) = work.upload {
            let mut pinned = pending.spare.take(bytes.len())?;
            let room = driver_call("a batch", pinned.as_mut_slice())?;
            room[..bytes.len()].copy_from_slice(bytes);
            // Kept until an event after the copy.
            let pinned = driver_call("a batch", pending.upload.insert(pinned).as_slice())?;
            memory::write(&self.queue.stream, buffer, 0, &pinned[..bytes.len()])?;
        }
        match work.timed {
            Some(operations) => {
                for (command, operation) in work.commands.iter().zip(operations) {
                    if pending
                        .marks
                        .last()
                        .is_none_or(|(last, _)| last != operation)
                    {
                        let event = self.queue.mark(true)?;
                        pending.marks.push((*operation, event));
                    }
                    // An event stands between it and the kernel before, or may: it starts when that has ended.
                    self.queue.command(command, false)?;
                }
            }
            None => self.run(work)?,
        }
        let bytes = work.answers.iter().map(|place| place.range().len()).sum();
        if bytes > 0 {
            // Kept until an event after the copies.
            let pinned = pending.spare.take(bytes)?;
            let (pinned, len) = pending.answers.insert((pinned, bytes));
            let mut rest = &mut driver_call("an answer", pinned.as_mut_slice())?[..*len];
            for place in work.answers {
                let (part, others) = rest.split_at_mut(place.range().len());
                rest = others;
                if !part.is_empty() {
                    memory::read(&self.queue.stream, place, part)?;
                }
            }
        }
        Ok(())
    }

    fn run(&mut self, work: &Work<'_>) -> Result<()> {
        match work.step {
            _ if work.commands.is_empty() => Ok(()),
            NO_STEP => self.queue.commands(work.commands),
            step => self.graphs.run(step, work.commands, &mut self.queue),
        }
    }
}

impl Runner for Queue {
    type Graph = CudaGraph;

    fn commands(&mut self, commands: &[Command]) -> Result<()> {
        let wanted = self.early;
        with_early(commands).try_for_each(|(command, early)| self.command(command, early && wanted))
    }

    fn capture(&mut self, commands: &[Command]) -> Result<CudaGraph> {
        // Queries of a library or the driver run now: none are allowed while a stream is captured.
        self.products.plan_all(commands)?;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        driver_call("a capture", self.stream.begin_capture(mode))?;
        let encoded = self.commands(commands);
        // The capture ends here even if a command failed.
        let ended = self.stream.end_capture(sys::CUgraphInstantiate_flags(0));
        encoded?;
        driver_call("a capture", ended)?.ok_or_else(|| BackendError::Driver {
            backend: "cuda",
            what: "a capture".to_owned(),
            reason: "it gave no graph".to_owned(),
        })
    }

    fn launch(&mut self, graph: &CudaGraph) -> Result<()> {
        let launch = || driver_call("a graph", graph.launch());
        self.ranks.held(launch)
    }
}

impl Queue {
    /// An event at the stream's current end.
    fn mark(&self, timed: bool) -> Result<CudaEvent> {
        let flags = timed.then_some(sys::CUevent_flags::CU_EVENT_DEFAULT);
        driver_call("an event", self.stream.record_event(flags))
    }

    fn command(&mut self, command: &Command, early: bool) -> Result<()> {
        match command {
            Command::Launch(launch) => self.kernel(launch, early),
            Command::Product(product) => self.products.run(&self.stream, product),
            Command::Copy { from, to } => memory::copy(&self.stream, from, to),
            Command::Collective(collective) => self.ranks.run(collective),
        }
    }

    fn kernel(&mut self, of: &Launch, early: bool) -> Result<()> {
        let function = self.functions.get(of.kernel(), of.shared())?;
        let address = |buffer: &Buffer| Ok(DeviceMemory::of(&self.stream, buffer)?.address());
        let mut parameters = of.parameters(address)?;
        // SAFETY: the parameters are the struct that the kernel takes: `parameters` checks its name, and the generated headers
        // its layout. Each pointer is to memory that is freed on this stream, after the launch. Every kernel begins by waiting
        // for those before, which the emulated machine and `tests/cuda_kernels.rs` check, and `early` is true behind another
        // kernel only.
        unsafe { launch(&self.stream, function, of, &mut parameters, early) }
    }
}

/// A submission in progress.
pub(super) struct Pending {
    spare: Arc<Spare>,
    upload: Option<Pinned>,
    answers: Option<(Pinned, usize)>,
    event: Option<Arc<CudaEvent>>,
    /// The event at the start of each run of an operation's commands.
    marks: Vec<(usize, CudaEvent)>,
    /// Whether a task waits for the event.
    awaited: bool,
}

impl Pending {
    /// The results, once the device has reached `event`.
    fn finish(&mut self, event: &CudaEvent) -> Result<Answers> {
        let mut answers = Answers::default();
        let ends = self.marks.iter().skip(1).map(|(_, event)| event);
        for ((operation, start), end) in self.marks.iter().zip(ends.chain([event])) {
            let milliseconds = driver_call("an event's time", start.elapsed_ms(end))?;
            let milliseconds = f64::from(milliseconds);
            answers.milliseconds.push((*operation, milliseconds));
        }
        if let Some((pinned, len)) = &self.answers {
            answers.bytes = driver_call("an answer", pinned.as_slice())?[..*len].to_vec();
        }
        Ok(answers)
    }

    fn is_complete(event: &CudaEvent) -> Result<bool> {
        driver_call("its context", event.context().bind_to_thread())?;
        driver_call("a step", event.try_is_complete())
    }
}

impl Future for Pending {
    type Output = Result<Answers>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<Self::Output> {
        let Some(event) = self.event.clone() else {
            return Poll::Ready(Ok(Answers::default()));
        };
        match Self::is_complete(&event) {
            Ok(true) => return Poll::Ready(self.finish(&event)),
            Ok(false) => {}
            Err(error) => return Poll::Ready(Err(error)),
        }
        if !std::mem::replace(&mut self.awaited, true) {
            // An error is reported again when the future queries the event.
            await_device(cx, "cuda", move || {
                let _ = event.synchronize();
            })?;
        }
        Poll::Pending
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        // If no task waited for the device, it may still use them.
        let answers = self.answers.take().map(|(pinned, _)| pinned);
        for pinned in answers.into_iter().chain(self.upload.take()) {
            self.spare.give(pinned, self.event.as_ref());
        }
    }
}
