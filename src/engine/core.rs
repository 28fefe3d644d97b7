//! The engine: a state machine that takes requests and, step by step, turns them into events.
//!
//! [`Engine::step`] admits waiting sequences (`admit.rs`), builds one batch (`schedule.rs`), runs it, and processes its
//! output (`process_output.rs`). It awaits only the device: threads, clocks and channels belong to the code that drives it.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;

use super::ahead::Submitted;
use super::event::{Event, FinishReason};
use super::export::Exports;
use super::options::EngineOptions;
use super::request::{Request, RequestId};
use super::sampling::{Sampler, Vocabulary};
use super::schedule::{Planned, PlannedTrace};
use super::sequence::{Sequence, likeliest};
use super::speculate::{Speculated, VerifiedRun};
use super::step_cache::{StepCache, StepForm};
use crate::backend::{StepOutput, Ticket};
use crate::cache::{
    BlockHash, BlockRef, Cache, CacheObserver, Occupancy, Pools, PrefixHandle, Residency, SlotRef,
    StateSource,
};
use crate::checkpoint::Fingerprint;
use crate::error::{EngineError, Error, Scope};
use crate::model::Model;

/// Continuous batching over one model.
pub struct Engine {
    pub(super) model: Model,
    pub(super) options: EngineOptions,
    pub(super) fingerprint: Fingerprint,
    /// The tokens that may be sampled.
    pub(super) vocabulary: Vocabulary,
    pub(super) cache: Cache,
    pub(super) step_cache: StepCache,
    /// Waiting sequences, by priority and order of arrival.
    pub(super) waiting: VecDeque<Sequence>,
    /// Running sequences, in order of admission.
    pub(super) running: Vec<Sequence>,
    /// Imports that have a slot and blocks but whose caches have not all come: they neither wait nor run.
    pub(super) incoming: Vec<Sequence>,
    /// Whether all remaining work waits for slots and blocks that are reserved for such imports.
    pub(super) stalled: bool,
    /// Requests whose caches are exported.
    pub(super) exports: Exports,
    pub(super) next_arrival: u64,
    pub(super) preemptions: u64,
    pub(super) speculated: Speculated,
    /// Traced sequences that have run a token since the other sequences last ran.
    pub(super) traced: usize,
    /// Whether shorter prompts left no tokens of the last step for the prompt whose turn it was.
    pub(super) passed_over: bool,
    cancelled: Vec<RequestId>,
    /// Whether the device was lost and is not known to be usable again.
    pub(super) lost: bool,
    /// The error of the device after which requests are kept and nothing runs.
    pub(super) device_error: Option<Arc<Error>>,
    /// A step that was submitted before the tokens of the step before it were known.
    pub(super) submitted: Option<Submitted>,
    pub(super) events: VecDeque<(RequestId, Event)>,
}

/// Mutable access to the pools of a model.
pub(super) fn pools(model: &mut Model) -> Pools<'_> {
    let (states, latents) = (model.states(), model.latents());
    Pools {
        backend: model.backend(),
        states,
        latents,
    }
}

impl Engine {
    /// An engine over a model.
    #[must_use]
    pub fn new(model: Model, options: EngineOptions) -> Self {
        let fingerprint = model.fingerprint();
        let root = BlockHash::root(fingerprint, &model.states().layout, &model.latents().layout);
        let limits = *model.limits();
        let vocabulary = Vocabulary::new(model.config().vocab_size);
        let cache = Cache::new(
            root,
            limits.slots,
            limits.blocks,
            limits.block_tokens,
            options.host_bytes,
        );
        Self {
            model,
            options,
            fingerprint,
            vocabulary,
            cache,
            step_cache: StepCache::new(options.cached_steps),
            waiting: VecDeque::new(),
            running: Vec::new(),
            incoming: Vec::new(),
            stalled: false,
            exports: Exports::default(),
            next_arrival: 0,
            preemptions: 0,
            speculated: Speculated::default(),
            traced: 0,
            passed_over: false,
            cancelled: Vec::new(),
            lost: false,
            device_error: None,
            submitted: None,
            events: VecDeque::new(),
        }
    }

    /// Suppresses tokens: ids that have a row in the embedding and no token in the tokenizer are never sampled.
    /// Log-probabilities stay those of the whole row.
    #[must_use]
    pub fn suppress_tokens(mut self, tokens: &[u32]) -> Self {
        self.vocabulary = self.vocabulary.suppressing(tokens);
        self
    }

    /// Maximum number of tokens of a sequence.
    #[must_use]
    pub fn context(&self) -> usize {
        self.model.context()
    }

    /// Usage of the pools.
    #[must_use]
    pub fn occupancy(&self) -> Occupancy {
        self.cache.occupancy()
    }

    /// Number of slots and of blocks that sequences, exports and imports use; each is counted once, however many share it.
    #[must_use]
    pub fn held(&self) -> (usize, usize) {
        let (mut slots, mut blocks) = (HashSet::new(), HashSet::new());
        for sequence in self.sequences() {
            let prefix = &sequence.prefix;
            slots.extend(
                prefix
                    .state
                    .iter()
                    .filter_map(Residency::device)
                    .map(SlotRef::get),
            );
            blocks.extend(
                prefix
                    .rows
                    .iter()
                    .filter_map(Residency::device)
                    .map(BlockRef::get),
            );
            if let Some(allocation) = &sequence.allocation {
                let spare = allocation.spare.as_ref().map(SlotRef::get);
                let own = [Some(allocation.slot.get()), allocation.slot_in(), spare];
                slots.extend(own.into_iter().flatten());
                blocks.extend(allocation.blocks.iter().map(BlockRef::get));
            }
        }
        self.exports.held(&mut slots, &mut blocks);
        (slots.len(), blocks.len())
    }

    /// Number of running and of waiting sequences.
    #[must_use]
    pub fn load(&self) -> (usize, usize) {
        (self.running.len(), self.waiting.len())
    }

    /// Number of answers that run or wait, including those that a prompt has yet to be forked into.
    pub(super) fn answers(&self) -> usize {
        self.sequences().map(Sequence::answers).sum()
    }

    /// All sequences: running, waiting, and imports.
    pub(super) fn sequences(&self) -> impl Iterator<Item = &Sequence> {
        self.running
            .iter()
            .chain(&self.waiting)
            .chain(&self.incoming)
    }

    /// Number of preemptions so far.
    #[must_use]
    pub fn preemptions(&self) -> u64 {
        self.preemptions
    }

    /// Takes a request into the queue.
    ///
    /// # Errors
    /// A request that cannot run, with the reason; it is not queued then.
    pub fn submit(&mut self, id: RequestId, request: Request) -> Result<(), EngineError> {
        self.check(id, &request)?;
        self.enqueue_new(id, request, None)?;
        Ok(())
    }

    /// Queues a checked request; `import` is the number of tokens whose caches are imported, if any.
    ///
    /// # Errors
    /// A grammar that does not allow the answer's first tokens.
    pub(super) fn enqueue_new(
        &mut self,
        id: RequestId,
        request: Request,
        import: Option<usize>,
    ) -> Result<(), EngineError> {
        let sampler = Sampler::of(&request, &self.vocabulary)?;
        let arrival = self.arrival();
        let tokens = self.cache.hash(&request.prompt);
        let mut sequence = Sequence::new(id, Arc::new(request), tokens, 0, arrival, sampler);
        sequence.import = import;
        let ahead = self.queue_index(&sequence);
        self.emit(id, Event::Queued { ahead });
        self.waiting.insert(ahead, sequence);
        Ok(())
    }

    /// Cancels a request. At the next step all that it holds is freed; its answers finish as cancelled.
    pub fn cancel(&mut self, id: RequestId) {
        self.cancelled.push(id);
    }

    /// The events since the last call, in order.
    pub fn take_events(&mut self) -> impl Iterator<Item = (RequestId, Event)> + '_ {
        self.events.drain(..)
    }

    /// Whether any work is left.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }

    /// Whether the remaining work can continue only when imports have come or are given up, or after a device's error
    /// ([`Engine::device_error`]).
    #[must_use]
    pub fn is_stalled(&self) -> bool {
        self.stalled || self.device_error.is_some()
    }

    /// Removes every cached prefix.
    pub fn clear_cache(&mut self) {
        self.cache.clear();
    }

    /// Tells an observer which blocks are cached, and from now on of each that comes or goes. It takes the place of the one before.
    pub fn observe_cache(&mut self, observer: Box<dyn CacheObserver>) {
        self.cache.observe(observer);
    }

    pub(super) fn arrival(&mut self) -> u64 {
        self.next_arrival += 1;
        self.next_arrival
    }

    pub(super) fn emit(&mut self, id: RequestId, event: Event) {
        self.events.push_back((id, event));
    }

    /// One step: a batch of whatever can run, or tokens that the last one verified. Returns whether work is left that can be
    /// done. An error ends the requests that it concerns, each with an event: those of a refused step, or all of them if the
    /// device is lost and they are not kept
    /// ([`EngineOptions::keep_on_device_error`](super::EngineOptions::keep_on_device_error)).
    pub async fn step(&mut self) -> bool {
        self.drop_cancelled();
        if self.device_error.is_some() {
            return false;
        }
        self.stalled = false;
        let stepped = match self.recover() {
            Ok(()) => self.try_step().await,
            Err(error) => Err(error),
        };
        if let Err(error) = stepped {
            self.failed(error);
        }
        !self.is_idle() && !self.is_stalled()
    }

    /// Makes the device usable again if it was lost and there is work for it.
    fn recover(&mut self) -> Result<(), Error> {
        if self.lost && !self.is_idle() {
            self.model.backend().recover()?;
            self.lost = false;
        }
        Ok(())
    }

    async fn try_step(&mut self) -> Result<(), Error> {
        if self.take_verified() {
            return Ok(());
        }
        let mut step = match self.submitted.take() {
            Some(step) => step,
            None => {
                self.admit().await?;
                let Some(planned) = self.plan().await? else {
                    return Ok(());
                };
                if let Some(trace) = planned.trace {
                    let ran = self.run_traced(&planned, trace).await;
                    return self.ran(planned, ran).await;
                }
                match self.submit_planned(&planned) {
                    Ok(tickets) => Submitted { planned, tickets },
                    Err(error) => return self.ran(planned, Err(error)).await,
                }
            }
        };
        let next = self.submit_ahead(&step.planned).await?;
        let output = step.output().await;
        if output.is_ok() {
            self.submitted = next;
        }
        self.ran(step.planned, output).await?;
        // What is left of a step without any of its sequences is not waited for.
        let running = &self.running;
        let runs = |step: &Submitted| {
            step.planned
                .segments
                .iter()
                .any(|one| one.of(running).is_some())
        };
        self.submitted = self.submitted.take().filter(runs);
        Ok(())
    }

    /// Processes the result of a step.
    pub(super) async fn ran(
        &mut self,
        planned: Planned,
        output: Result<StepOutput, Error>,
    ) -> Result<(), Error> {
        match output {
            Ok(output) => self.process_output(planned, output).await,
            Err(error) => {
                // A step that failed is not reused; if memory ran out, dropping the others frees theirs.
                self.step_cache.clear();
                self.refuse(planned.owners(&error), error)
            }
        }
    }

    /// Ends requests with an error that concerns only them.
    ///
    /// # Errors
    /// The same error if the device failed: then it concerns all requests.
    pub(super) fn refuse(
        &mut self,
        mut ids: Vec<RequestId>,
        error: impl Into<Error>,
    ) -> Result<(), Error> {
        let error = error.into();
        if error.scope() == Scope::Device {
            return Err(error);
        }
        let error = Arc::new(error);
        ids.sort_unstable();
        ids.dedup();
        for id in ids {
            // Another answer of the same request may have failed before.
            if self.sequences().any(|sequence| sequence.id == id) {
                self.fail(id, &error);
            }
        }
        Ok(())
    }

    /// Submits a step: one ticket, or one per layer.
    pub(super) fn submit_planned(
        &mut self,
        planned: &Planned,
    ) -> Result<Vec<Ticket<StepOutput>>, Error> {
        let by_layer = self.exports_end(planned);
        let form = match (by_layer, planned.stepwise) {
            (true, _) => StepForm::Layers,
            (false, true) => StepForm::Stepwise,
            (false, false) => StepForm::Whole,
        };
        let (batch, step_options) = (&planned.batch, planned.step_options);
        let steps = self
            .step_cache
            .steps(&mut self.model, batch, step_options, form)?;
        let mut tickets = Vec::with_capacity(steps.len());
        for (layer, step) in steps.iter_mut().enumerate() {
            tickets.push(step.submit(batch)?);
            if by_layer {
                self.exports.layer_done(&mut self.model, layer);
            }
        }
        Ok(tickets)
    }

    /// Runs one token alone: emits its trace, and undoes its writes.
    async fn run_traced(
        &mut self,
        planned: &Planned,
        trace: PlannedTrace,
    ) -> Result<StepOutput, Error> {
        let (batch, owner) = (&planned.batch, &planned.segments[0]);
        let before = self.before_undo(owner).await?;
        let traced =
            self.step_cache
                .traced(&mut self.model, batch, trace.choice, planned.step_options)?;
        traced.time(trace.timed)?;
        let output = traced.step.submit(batch)?.await?;
        let mut frame = traced.frame(&output, owner.end - 1, batch.tokens[0]);
        frame.next = output.choices.first().and_then(|choice| {
            let logit = choice.target_logit?;
            Some(logit - choice.log_normaliser)
        });
        if let Some(choice) = output.choices.first() {
            frame.likely = likeliest(choice, trace.likely);
        }
        if let Some(before) = &before {
            self.undo(owner, before, &mut frame).await?;
        }
        if trace.emitted {
            let (sample, frame) = (owner.sample, Box::new(frame));
            self.emit(owner.id, Event::Trace { sample, frame });
        }
        Ok(output)
    }

    /// Ends one answer of a request, whose last token completed a stop string: no more of it is computed. Its state is cached
    /// like that of any answer.
    pub fn stop(&mut self, id: RequestId, sample: usize) {
        let wanted =
            |sequence: &Sequence| sequence.single && (sequence.id, sequence.sample) == (id, sample);
        self.finish_all(wanted, FinishReason::Stop);
    }

    fn drop_cancelled(&mut self) {
        for id in std::mem::take(&mut self.cancelled) {
            let cancelled = Arc::new(Error::from(EngineError::TransferCancelled));
            self.exports.fail(id, &cancelled);
            self.finish_all(|sequence| sequence.id == id, FinishReason::Cancelled);
        }
    }

    fn finish_all(&mut self, wanted: impl Fn(&Sequence) -> bool, reason: FinishReason) {
        while let Some(index) = self.running.iter().position(&wanted) {
            let sequence = self.running.remove(index);
            self.finish(sequence, reason);
        }
        while let Some(index) = self.waiting.iter().position(&wanted) {
            if let Some(sequence) = self.waiting.remove(index) {
                self.finish(sequence, reason);
            }
        }
        while let Some(index) = self.incoming.iter().position(&wanted) {
            let sequence = self.incoming.remove(index);
            self.finish(sequence, reason);
        }
    }

    /// Ends an answer: its state is cached for later requests, everything else it held is freed.
    pub(super) fn finish(&mut self, sequence: Sequence, reason: FinishReason) {
        self.keep_end(&sequence);
        let (id, usage) = (sequence.id, sequence.usage());
        // If it ends during its prompt, the answers that would have been forked from it end too.
        let samples = match sequence.single {
            true => sequence.sample..sequence.sample + 1,
            false => 0..sequence.request.samples,
        };
        for sample in samples {
            let event = Event::Finished {
                sample,
                reason,
                stop_token: sequence.stop_token,
                usage,
            };
            self.emit(id, event);
        }
    }

    /// Caches the final state of an answer.
    fn keep_end(&mut self, sequence: &Sequence) {
        if let Some(allocation) = &sequence.allocation
            && matches!(allocation.state, StateSource::Own)
            && sequence.request.cacheable()
            && sequence.decodes()
        {
            let tokens = sequence.tokens.prefix(sequence.position);
            self.cache
                .store(tokens, &allocation.blocks, &allocation.slot);
        }
    }

    /// Ends a request with an error.
    pub(super) fn fail(&mut self, id: RequestId, error: &Arc<Error>) {
        self.running.retain(|sequence| sequence.id != id);
        self.waiting.retain(|sequence| sequence.id != id);
        self.incoming.retain(|incoming| incoming.id != id);
        self.exports.fail(id, error);
        self.emit(id, Event::Failed(Arc::clone(error)));
    }

    /// Inserts a sequence into the waiting queue by its priority and order of arrival.
    pub(super) fn enqueue(&mut self, sequence: Sequence) {
        let index = self.queue_index(&sequence);
        self.waiting.insert(index, sequence);
    }

    /// The sequence's place in the waiting queue.
    fn queue_index(&self, sequence: &Sequence) -> usize {
        let order = |sequence: &Sequence| (sequence.order(), sequence.sample);
        self.waiting
            .partition_point(|other| order(other) <= order(sequence))
    }

    /// The slot and blocks of a running sequence as a prefix handle on the device, except for its partial block, which is
    /// copied.
    ///
    /// # Errors
    /// A device that fails.
    pub(super) async fn suspend(&mut self, sequence: &mut Sequence) -> Result<(), Error> {
        let block_tokens = self.model.limits().block_tokens;
        let (whole, partial_tokens) = (
            sequence.position / block_tokens,
            sequence.position % block_tokens,
        );
        // Read before anything is freed: if the device fails, the sequence still holds what it held.
        let partial = match &sequence.allocation {
            Some(allocation) if partial_tokens > 0 => {
                let wanted = [(allocation.blocks[whole].get(), partial_tokens)];
                pools(&mut self.model).read_blocks(&wanted).await?
            }
            _ => Vec::new(),
        };
        let Some(allocation) = sequence.allocation.take() else {
            return Ok(());
        };
        // Verified tokens that were not handed out are drawn again: the state after them is not kept.
        sequence.verified = VerifiedRun::default();
        let state = match allocation.state {
            StateSource::Own => Some(Residency::Device(allocation.slot)),
            StateSource::Shared(slot) => Some(Residency::Device(slot)),
            StateSource::Zero => None,
        };
        let whole = allocation
            .blocks
            .into_iter()
            .take(whole)
            .map(Residency::Device);
        let partial = partial
            .into_iter()
            .map(|rows| Residency::Host(Arc::new(rows)));
        let rows = whole.chain(partial).collect();
        sequence.prefix = PrefixHandle {
            position: sequence.position,
            state,
            rows,
        };
        Ok(())
    }
}
