//! Running commands on the stream: one by one, or as a graph of those that came before.

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context as TaskContext, Poll};

use cudarc::driver::result;
use cudarc::driver::sys;

use super::compile::Functions;
use super::pinned::Event;
use super::product::Products;
use super::{Context, Pinned, Spare, told};
use crate::backend::Result;
use crate::backend::cuda::machine::{Answers, Command, Launch, Work};
use crate::backend::cuda::step::NO_STEP;

/// Lists of commands remembered for a step, and graphs kept.
const REMEMBERED: usize = 8;

/// A graph that can be launched.
struct Graph(sys::CUgraphExec);

// SAFETY: graphs may be used from any thread with the context current; they live behind a lock.
unsafe impl Send for Graph {}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: made by `instantiate`, destroyed once. Those that run are kept by the driver until they end.
        let _ = unsafe { result::graph::exec_destroy(self.0) };
    }
}

/// Commands that came before; a graph from their second time on.
struct Known {
    commands: Vec<Command>,
    graph: Option<Graph>,
}

pub(super) struct State {
    // Before the functions: graphs call them.
    known: HashMap<u64, Vec<Known>>,
    functions: Functions,
    products: Products,
}

impl State {
    pub(super) fn new(context: &Arc<Context>, capability: (i32, i32), driver: i32) -> Result<Self> {
        Ok(Self {
            known: HashMap::new(),
            functions: Functions::new(capability, driver),
            products: Products::new(context)?,
        })
    }

    /// Makes one kernel, to see that kernels can be made.
    pub(super) fn try_out(&mut self) -> Result<()> {
        self.functions.get("add", 0).map(|_| ())
    }

    pub(super) fn forget(&mut self, step: u64) {
        self.known.remove(&step);
    }

    pub(super) fn submit(
        &mut self,
        context: &Arc<Context>,
        spare: &Arc<Spare>,
        work: &Work<'_>,
    ) -> Result<Pending> {
        let mut pending = Pending {
            spare: Arc::clone(spare),
            upload: None,
            answers: None,
            event: None,
            marks: Vec::new(),
        };
        let enqueued = self.enqueue(context, work, &mut pending);
        // Whatever was enqueued may still use the pinned memory: it is kept until this.
        match Event::record(context, work.timed.is_some()) {
            Ok(event) => pending.event = Some(event),
            Err(error) => {
                // SAFETY: the stream lives. What it says does not matter more than that nothing runs afterwards.
                let _ = unsafe { result::stream::synchronize(context.stream) };
                return Err(enqueued.err().unwrap_or(error));
            }
        }
        enqueued?;
        Ok(pending)
    }

    fn enqueue(
        &mut self,
        context: &Arc<Context>,
        work: &Work<'_>,
        pending: &mut Pending,
    ) -> Result<()> {
        if let Some((address, bytes)) = work.upload {
            let mut pinned = pending.spare.take(bytes.len())?;
            pinned.bytes_mut()[..bytes.len()].copy_from_slice(bytes);
            let pinned = pending.upload.insert(pinned);
            // SAFETY: the address has room for the batch; the pinned memory is kept until an event after the copy.
            told("a batch", unsafe {
                result::memcpy_htod_async(address, &pinned.bytes()[..bytes.len()], context.stream)
            })?;
        }
        match work.timed {
            Some(operations) => {
                for (command, operation) in work.commands.iter().zip(operations) {
                    if pending
                        .marks
                        .last()
                        .is_none_or(|(last, _)| last != operation)
                    {
                        let event = Event::record(context, true)?;
                        pending.marks.push((*operation, event));
                    }
                    self.command(context, command)?;
                }
            }
            None => self.run(context, work)?,
        }
        let bytes: u64 = work.answers.iter().map(|(_, bytes)| bytes).sum();
        if bytes > 0 {
            let pinned = pending.spare.take(bytes as usize)?;
            let (pinned, len) = pending.answers.insert((pinned, bytes as usize));
            let mut rest = &mut pinned.bytes_mut()[..*len];
            for (address, bytes) in work.answers {
                let (part, others) = rest.split_at_mut(*bytes as usize);
                rest = others;
                if !part.is_empty() {
                    // SAFETY: the address has so many bytes; the pinned memory is kept until an event after the copy.
                    told("an answer", unsafe {
                        result::memcpy_dtoh_async(part, *address, context.stream)
                    })?;
                }
            }
        }
        Ok(())
    }

    /// Runs commands: as a graph, if the same came before in this step.
    fn run(&mut self, context: &Arc<Context>, work: &Work<'_>) -> Result<()> {
        if work.commands.is_empty() {
            return Ok(());
        }
        if work.step == NO_STEP {
            return self.commands(context, work.commands);
        }
        let known = self.known.entry(work.step).or_default();
        let Some(at) = known
            .iter()
            .position(|known| known.commands == work.commands)
        else {
            if known.len() >= REMEMBERED {
                known.remove(0);
            }
            known.push(Known {
                commands: work.commands.to_vec(),
                graph: None,
            });
            return self.commands(context, work.commands);
        };
        // The one used last is forgotten last.
        let mut found = known.remove(at);
        if found.graph.is_none() {
            found.graph = Some(self.capture(context, work.commands)?);
        }
        let launched = found.graph.as_ref().map_or(Ok(()), |graph| {
            // SAFETY: the graph lives, and what its commands point to lives as long as the step.
            told("a graph", unsafe {
                result::graph::launch(graph.0, context.stream)
            })
        });
        self.known.entry(work.step).or_default().push(found);
        launched
    }

    fn commands(&mut self, context: &Arc<Context>, commands: &[Command]) -> Result<()> {
        commands
            .iter()
            .try_for_each(|command| self.command(context, command))
    }

    fn capture(&mut self, context: &Arc<Context>, commands: &[Command]) -> Result<Graph> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives. Everything that the commands need was loaded when they ran the first time.
        told("a capture", unsafe {
            result::stream::begin_capture(context.stream, mode)
        })?;
        let recorded = self.commands(context, commands);
        // SAFETY: the capture began above and ends here, whatever happened between.
        let ended = unsafe { result::stream::end_capture(context.stream) };
        if let Err(error) = recorded {
            if let Ok(graph) = ended {
                // SAFETY: captured above, and of no use.
                let _ = unsafe { result::graph::destroy(graph) };
            }
            return Err(error);
        }
        let graph = told("a capture", ended)?;
        // SAFETY: the graph was captured above, and is not needed once it is instantiated.
        let executable = unsafe {
            let made = result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0));
            let _ = result::graph::destroy(graph);
            told("a graph", made)?
        };
        Ok(Graph(executable))
    }

    fn command(&mut self, context: &Arc<Context>, command: &Command) -> Result<()> {
        match command {
            Command::Launch(launch) => self.launch(context, launch),
            Command::Product(product) => self.products.run(context, product),
            // SAFETY: whoever records a copy vouches for its two ends.
            Command::Copy { from, to, bytes } => told("a copy", unsafe {
                result::memcpy_dtod_async(*to, *from, *bytes as usize, context.stream)
            }),
        }
    }

    fn launch(&mut self, context: &Arc<Context>, launch: &Launch) -> Result<()> {
        let function = self.functions.get(launch.kernel, launch.shared)?;
        let mut arguments: Vec<[u8; 8]> = launch
            .arguments
            .iter()
            .map(|argument| argument.bytes().0)
            .collect();
        let mut pointers: Vec<_> = arguments
            .iter_mut()
            .map(|bytes| bytes.as_mut_ptr().cast())
            .collect();
        let [x, y, z] = launch.grid;
        // SAFETY: the arguments are of the types that the kernel declares, which the emulated machine checks, and point to
        // memory that lives as long as the step; the driver copies them before it returns.
        told(launch.kernel, unsafe {
            result::launch_kernel(
                function,
                (x, y, z),
                (launch.threads, 1, 1),
                launch.shared,
                context.stream,
                &mut pointers,
            )
        })
    }
}

/// A submission under way.
pub(super) struct Pending {
    spare: Arc<Spare>,
    upload: Option<Pinned>,
    answers: Option<(Pinned, usize)>,
    event: Option<Event>,
    /// Where each run of an operation's commands begins.
    marks: Vec<(usize, Event)>,
}

impl Pending {
    fn finish(&mut self) -> Result<Answers> {
        let mut answers = Answers::default();
        let Some(event) = self.event.take() else {
            return Ok(answers);
        };
        event.wait()?;
        let ends = self.marks.iter().skip(1).map(|(_, event)| event);
        for ((operation, start), end) in self.marks.iter().zip(ends.chain([&event])) {
            let milliseconds = f64::from(start.until(end)?);
            answers.milliseconds.push((*operation, milliseconds));
        }
        if let Some((pinned, len)) = &self.answers {
            answers.bytes = pinned.bytes()[..*len].to_vec();
        }
        let used = self.answers.take().map(|(pinned, _)| pinned);
        for pinned in used.into_iter().chain(self.upload.take()) {
            self.spare.give(pinned);
        }
        Ok(answers)
    }
}

impl Future for Pending {
    type Output = Result<Answers>;

    fn poll(mut self: Pin<&mut Self>, _cx: &mut TaskContext<'_>) -> Poll<Self::Output> {
        Poll::Ready(self.finish())
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        // Nobody asked: the memory must wait for the device all the same.
        drop(self.finish());
    }
}
