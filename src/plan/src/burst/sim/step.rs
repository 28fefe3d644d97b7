//! Steps and micro-batches.

use super::super::Policy;
use super::super::batch::{Chunk, balance};
use super::super::instance::Form;
use super::{Event, Flight, Part, Simulation, State, WATERMARK};

impl Simulation<'_> {
    /// Starts a step, if there is work and a free stage.
    pub(super) fn launch(&mut self, number: usize) {
        let group = &self.groups[number];
        if !group.alive || group.closing || group.flights.len() >= group.free_at.len() {
            return;
        }
        if self.now < group.free_at[0] {
            return self.kick(number);
        }
        self.admit(number);
        let decodes = self.take_decodes(number);
        let cached = |job: &u32| u64::from(self.jobs[*job as usize].filled);
        let all_cached = decodes.iter().map(cached).sum();
        let decode_cost = self.costs.decode(decodes.len(), all_cached);
        let chunks = self.choose(number, decode_cost);
        if decodes.is_empty() && chunks.is_empty() {
            return;
        }
        let seconds = self.seconds(number, &decodes, &chunks, decode_cost);
        let tokens = decodes.len() + chunks.iter().map(|c| c.tokens as usize).sum::<usize>();
        let flight = self.free_flights.pop().unwrap_or_else(|| {
            self.flights.push(Flight::default());
            self.flights.len() - 1
        });
        let mut parts = std::mem::take(&mut self.flights[flight].parts);
        parts.extend(decodes.iter().map(|job| Part {
            job: *job,
            decode: true,
            last: false,
        }));
        for chunk in chunks {
            parts.push(self.begin(number, chunk));
        }
        self.flights[flight] = Flight {
            group: number,
            parts,
            decode_cost,
        };
        let end = self.pass(number, seconds, tokens);
        self.groups[number].flights.push_back(flight);
        self.at(end, Event::Through(flight));
        self.kick(number);
    }

    /// Records that a chunk is in a step.
    fn begin(&mut self, number: usize, chunk: Chunk) -> Part {
        let job = &mut self.jobs[chunk.job as usize];
        job.filled += chunk.tokens;
        job.flying += 1;
        let last = job.filled == job.target;
        let group = &mut self.groups[number];
        group.pending -= u64::from(chunk.tokens);
        if last {
            group.prefill.retain(|other| *other != chunk.job);
        }
        Part {
            job: chunk.job,
            decode: false,
            last,
        }
    }

    /// Admits queued requests while there is memory for them and the prompts do not fill the next steps.
    fn admit(&mut self, number: usize) {
        let enough = self.look_ahead_tokens(number);
        loop {
            if let Some(job) = self.groups[number].swapped.front().copied() {
                if !self.swap_in(number, job) {
                    return;
                }
                continue;
            }
            let group = &self.groups[number];
            let Some(job) = group.waiting.front().copied() else {
                return;
            };
            if group.pending >= enough {
                return;
            }
            let blocks = self.blocks(self.jobs[job as usize].target);
            let Some(home) = self.home(number, self.bytes(blocks)) else {
                return;
            };
            let share = self.memory.share(home, self.bytes(blocks));
            if !self.memory.take(home, share) {
                return;
            }
            let needed = self.needed(job);
            let group = &mut self.groups[number];
            group.waiting.pop_front();
            group.queued -= needed;
            let entry = self.job(job);
            (entry.blocks, entry.layout) = (blocks, home);
            self.go_on(job, number);
        }
    }

    /// The layout with the most free memory, if that is enough for a cache of `bytes` in addition to the watermark and caches
    /// being moved here.
    pub(super) fn home(&self, number: usize, bytes: u64) -> Option<usize> {
        let group = &self.groups[number];
        let room = |home: &usize| self.memory.room(*home);
        let home = group.homes.iter().copied().max_by_key(room)?;
        let limit = |i: &usize| self.memory.limit(*i);
        let limit = self.memory.members(home).iter().map(limit).min()?;
        let spare = (limit as f64 * WATERMARK) as u64 + group.reserve;
        let share = self.memory.share(home, bytes);
        (self.memory.room(home) >= share + spare).then_some(home)
    }

    /// Prompt tokens for the next steps: a budget for each micro-batch in flight, or for each member.
    fn look_ahead_tokens(&self, number: usize) -> u64 {
        let group = &self.groups[number];
        group.members.len() as u64 * u64::from(self.setup.options.budget_tokens)
    }

    /// The sequences that decode in the next step, each with memory for its token.
    fn take_decodes(&mut self, number: usize) -> Vec<u32> {
        let group = &self.groups[number];
        let most = group.decoding.div_ceil(group.free_at.len());
        let mut taken = Vec::with_capacity(most.min(group.decode.len()));
        let mut blocked = Vec::new();
        while taken.len() < most {
            let Some(job) = self.groups[number].decode.pop_front() else {
                break;
            };
            if self.grow(number, job) {
                self.job(job).flying = 1;
                taken.push(job);
            } else if self.jobs[job as usize].state == State::Running {
                blocked.push(job);
            }
        }
        // One of these may have given up its cache for a later one.
        for job in blocked.into_iter().rev() {
            if self.jobs[job as usize].state == State::Running {
                self.groups[number].decode.push_front(job);
            }
        }
        taken
    }

    /// Allocates a block for a sequence's next token if it needs one, from others if necessary. If there is none, the
    /// sequence waits or has given up its own cache.
    fn grow(&mut self, number: usize, job: u32) -> bool {
        let entry = &self.jobs[job as usize];
        let (layout, blocks) = (entry.layout, entry.blocks);
        if self.blocks(entry.filled + 1) <= blocks {
            return true;
        }
        let share = |blocks| self.memory.share(layout, self.bytes(blocks));
        let more = share(blocks + 1) - share(blocks);
        while !self.memory.take(layout, more) {
            if !self.relieve(number, job) {
                return false;
            }
        }
        self.job(job).blocks += 1;
        true
    }

    /// The chunks of the next step.
    fn choose(&self, number: usize, decode_cost: f64) -> Vec<Chunk> {
        let options = &self.setup.options;
        let group = &self.groups[number];
        let stages = group.free_at.len();
        let ahead = stages > 1 && options.look_ahead;
        let each = u64::from(options.budget_tokens);
        let mut left = if ahead { each * stages as u64 } else { each };
        let mut by_home = vec![each; group.homes.len()];
        let experts = group.homes.len() > 1;
        if experts {
            left *= group.homes.len() as u64;
        }
        let mut chunks = Vec::new();
        for job in &group.prefill {
            let entry = &self.jobs[*job as usize];
            let mut tokens = left.min(u64::from(entry.target - entry.filled));
            if experts {
                let home = group.homes.iter().position(|home| *home == entry.layout);
                let budget = &mut by_home[home.unwrap_or(0)];
                tokens = tokens.min(*budget);
                *budget -= tokens;
            }
            left -= tokens;
            if tokens > 0 {
                chunks.push(Chunk {
                    job: *job,
                    prefix: entry.filled,
                    tokens: tokens as u32,
                });
            }
            if left == 0 {
                break;
            }
        }
        if !ahead || chunks.is_empty() {
            return chunks;
        }
        let fixed = self.ahead(number, decode_cost, stages);
        let mut parts = balance(&fixed, &chunks, &self.costs, self.costs.read());
        parts.swap_remove(0)
    }

    /// Decode costs of the next micro-batches, in seconds: this one, those in flight when they run again, and the idle
    /// sequences.
    fn ahead(&self, number: usize, decode_cost: f64, stages: usize) -> Vec<f64> {
        let group = &self.groups[number];
        let mut fixed = vec![decode_cost];
        let under_way = group.flights.iter().take(stages - 1);
        fixed.extend(under_way.map(|flight| self.flights[*flight].decode_cost));
        let missing = stages - fixed.len();
        if missing > 0 {
            let idle = group.decode.iter();
            let cached = idle
                .map(|job| u64::from(self.jobs[*job as usize].filled))
                .sum();
            let rest = self.costs.decode(group.decode.len(), cached) / missing as f64;
            fixed.resize(stages, rest);
        }
        fixed
    }

    /// Seconds of a step on each stage.
    fn seconds(&self, number: usize, decodes: &[u32], chunks: &[Chunk], decode_cost: f64) -> f64 {
        let group = &self.groups[number];
        let fixed = self.costs.fixed(!chunks.is_empty(), !decodes.is_empty());
        let members = group.members.len() as f64;
        if self.way.form == Form::Layers || members == 1.0 {
            let prompts: f64 = chunks.iter().map(|chunk| self.costs.chunk(*chunk)).sum();
            return (fixed + prompts + decode_cost).max(self.costs.read()) / members;
        }
        // Every member computes the attention of its own tokens and an equal share of the experts; it reads its part of the
        // experts.
        let dropped =
            self.way.droppable_bytes as f64 / self.setup.instance.parameter_bytes() as f64;
        let kept = 1.0 - dropped + dropped / members;
        let network = self.setup.instance.network();
        let (mut longest, mut most) = (0.0f64, 0u64);
        for home in &group.homes {
            let here = |job: u32| self.jobs[job as usize].layout == *home;
            let (mut sequences, mut cached) = (0, 0);
            for job in decodes.iter().filter(|job| here(**job)) {
                sequences += 1;
                cached += u64::from(self.jobs[*job as usize].filled);
            }
            let mut cost = self.costs.decode(sequences, cached);
            let mut tokens = sequences as u64;
            for chunk in chunks.iter().filter(|chunk| here(chunk.job)) {
                cost += self.costs.chunk(*chunk);
                tokens += u64::from(chunk.tokens);
            }
            longest = longest.max(cost);
            most = most.max(tokens);
        }
        let sent = most as f64 * self.way.token_bytes as f64 * (members - 1.0);
        let waits = f64::from(self.way.crossings) * network.hop_seconds;
        let computed = (fixed * kept + longest).max(self.costs.read() * kept);
        computed + sent / network.bytes_per_second + waits
    }

    /// Sends a micro-batch through the stages; returns the time at which it leaves the last.
    fn pass(&mut self, number: usize, seconds: f64, tokens: usize) -> f64 {
        let network = self.setup.instance.network();
        let now = self.now;
        let group = &mut self.groups[number];
        let under_way = !group.flights.is_empty();
        let bytes = tokens as f64 * self.way.token_bytes as f64;
        let hop = network.hop_seconds + bytes / network.bytes_per_second;
        let mut ready = now;
        let piped = group.free_at.len() > 1;
        for (stage, free_at) in group.free_at.iter_mut().enumerate() {
            if stage > 0 {
                ready = (ready + hop).max(group.blocked_until);
            }
            let start = ready.max(*free_at);
            if piped {
                self.tally.busy += seconds;
                if under_way {
                    self.tally.idle += start - *free_at;
                }
            }
            ready = start + seconds;
            *free_at = ready;
        }
        group.stage_seconds = seconds;
        group.activation_bytes = bytes;
        self.tally.counts.steps += 1;
        ready
    }

    /// A micro-batch has finished: its tokens are available.
    pub(super) fn through(&mut self, flight: usize) {
        let number = self.flights[flight].group;
        let mut parts = std::mem::take(&mut self.flights[flight].parts);
        if self.groups[number].alive {
            let group = &mut self.groups[number];
            group.flights.retain(|other| *other != flight);
            for part in &parts {
                self.part_through(number, *part);
            }
        }
        parts.clear();
        self.flights[flight].parts = parts;
        self.free_flights.push(flight);
        if !self.groups[number].alive {
            return;
        }
        self.resume(number);
        if self.setup.policy == Policy::Migrate {
            self.migrate(number);
        }
        if self.groups[number].closing && self.groups[number].flights.is_empty() {
            self.drained(number);
        }
        self.kick(number);
    }

    fn part_through(&mut self, number: usize, part: Part) {
        let now = self.now;
        let job = &mut self.jobs[part.job as usize];
        job.flying -= 1;
        if part.decode {
            job.filled += 1;
            job.target = job.filled;
        } else if !part.last {
            return;
        }
        job.done += 1;
        if job.done == 1 {
            job.first_token = now;
        }
        let group = &mut self.groups[number];
        if job.done < job.output {
            group.decode.push_back(part.job);
            group.decoding += usize::from(!part.decode);
            return;
        }
        group.decoding -= usize::from(part.decode);
        group.running.remove(&part.job);
        job.state = State::Away;
        self.tally.answered(job, now);
        self.release(part.job);
        self.finished += 1;
    }
}
