//! What an observer of the prefix cache is told: the whole blocks before every checkpoint that a prompt can continue from.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;

use crate::engine_harness::{
    BLOCK, OPTIONS, Outcomes, answer, collect, drawn, engine, engine_on, finish, limits, request,
    tokens,
};
use crate::faulty::{Fault, Faulty, Shared};
use crate::speculation::{few, speculating};
use crate::told::{Told, backed};
use kimi_linear::backend::cpu::CpuBackend;
use kimi_linear::cache::{BlockHash, HashedTokens, Snapshot};
use kimi_linear::engine::{
    Engine, EngineHandle, EngineOptions, Request, RequestId, Sampling, UndoWrite,
};
use kimi_linear::error::{CacheError, Error};
use pollster::block_on;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

/// The parent key of every first block.
fn root(engine: &Engine) -> BlockHash {
    let (model, layout) = (engine.cache_header(Vec::new()).model, engine.cache_layout());
    BlockHash::root(model, &layout.states, &layout.latents)
}

/// Sets a new observer, which knows nothing yet.
fn observe(engine: &mut Engine) -> Told {
    let told = Told::new(root(engine));
    engine.observe_cache(Box::new(told.clone()));
    told
}

fn keys(root: BlockHash, tokens: &[u32]) -> Vec<BlockHash> {
    HashedTokens::new(root, BLOCK, tokens)
        .whole()
        .hashes
        .to_vec()
}

/// The position of the deepest checkpoint, 0 if there is none.
fn position(snapshot: Result<Snapshot, Error>) -> usize {
    match snapshot {
        Ok(snapshot) => snapshot.tokens.len(),
        Err(Error::Cache(CacheError::NothingKept { .. })) => 0,
        Err(error) => panic!("{error}"),
    }
}

/// The blocks before every checkpoint within these sequences.
fn reusable<T: AsRef<[u32]>>(engine: &mut Engine, known: &[T]) -> BTreeSet<BlockHash> {
    let root = root(engine);
    backed(root, BLOCK, known, |tokens| {
        position(block_on(engine.snapshot(tokens)))
    })
}

#[test]
fn a_prompt_reuses_the_whole_blocks_that_were_told() {
    for name in ["tiny-a", "tiny-128"] {
        let mut engine = engine(name, limits(2, 12, 64), OPTIONS);
        let told = observe(&mut engine);
        let root = root(&engine);
        let mut known: Vec<Vec<u32>> = Vec::new();
        // How much each prompt has in common with the sequence before it, and how many tokens of its own.
        let prompts = [(0, 70), (82, 9), (75, 9), (40, 30), (82, 5), (33, 40)];
        for (round, (common, own)) in prompts.into_iter().enumerate() {
            let common = known.last().map_or(&[][..], |before| &before[..common]);
            let prompt = [common, &tokens(60 + round as u64, own)].concat();
            let at = position(block_on(engine.snapshot(&prompt[..prompt.len() - 1])));
            let reused = at / BLOCK;
            assert!(told.leading(&keys(root, &prompt)) >= reused);
            // A prompt that leaves the cached tokens at its checkpoint reuses all that is stored of it.
            let leaving = [&prompt[..at], &tokens(99, 2 * BLOCK)].concat();
            assert_eq!(told.leading(&keys(root, &leaving)), reused);
            let found = answer(&mut engine, request(prompt.clone(), 12));
            assert_eq!(found.usage.cached_tokens, at, "{name}, round {round}");
            known.push([prompt, found.tokens].concat());
            assert_eq!(told.blocks(), reusable(&mut engine, &known), "{name}");
        }
        let late = observe(&mut engine);
        assert_eq!(late.blocks(), told.blocks());
        assert!(late.blocks().len() > 10);
        engine.clear_cache();
        assert!(late.blocks().is_empty());
    }
}

/// A request from a small family, so that prefixes are shared.
fn random(rng: &mut SmallRng) -> Request {
    let kind = rng.random_range(0..16_u64);
    let common = tokens(kind % 3 + 1, BLOCK * (kind % 4 + 1) as usize);
    let own = tokens(100 + kind, 1 + (kind * 7 % 40) as usize);
    let prompt = [common, own].concat();
    let turn_ends = match kind % 4 {
        0 => vec![prompt.len() / 2],
        _ => Vec::new(),
    };
    // Nothing after an undone write is cached.
    let undo = match rng.random_range(0..8) {
        0 => vec![UndoWrite {
            token: prompt.len() - 1,
            head: None,
        }],
        _ => Vec::new(),
    };
    let sampling = match kind % 3 {
        0 => drawn(rng.random()),
        _ => Sampling {
            logit_bias: few(kind),
            ..Sampling::GREEDY
        },
    };
    Request {
        sampling,
        turn_ends,
        undo,
        reuse: rng.random_range(0..8) > 0,
        samples: if kind % 5 == 0 { 3 } else { 1 },
        ..request(prompt, 3 + (kind * 5 % 30) as usize)
    }
}

/// The tokens of each answer so far, after those of its prompt.
fn sequences(submitted: &BTreeMap<RequestId, Request>, outcomes: &Outcomes) -> Vec<Vec<u32>> {
    let mut all = Vec::new();
    for (id, request) in submitted {
        for sample in 0..request.samples {
            let outcome = outcomes.get(&(*id, sample));
            let answer = outcome.map_or(&[][..], |outcome| &outcome.tokens);
            all.push([&request.prompt[..], answer].concat());
        }
    }
    all
}

/// What happened in all schedules of a seed.
#[derive(Debug, Default)]
struct Happened {
    evictions: u64,
    preemptions: u64,
    removals: usize,
    restored: usize,
}

/// An engine with its observer, and all that it was asked.
struct Observed {
    engine: Engine,
    told: Told,
    before: BTreeSet<BlockHash>,
    submitted: BTreeMap<RequestId, Request>,
    outcomes: Outcomes,
}

impl Observed {
    fn new(mut engine: Engine) -> Self {
        Self {
            told: observe(&mut engine),
            engine,
            before: BTreeSet::new(),
            submitted: BTreeMap::new(),
            outcomes: Outcomes::new(),
        }
    }

    fn submit(&mut self, id: u64, request: Request) {
        self.engine.submit(RequestId(id), request.clone()).unwrap();
        self.submitted.insert(RequestId(id), request);
    }

    fn step(&mut self) {
        block_on(self.engine.step());
        collect(&mut self.engine, &mut self.outcomes);
    }

    /// Asserts that it was told what prompts can reuse; returns the number of blocks that are gone since the last call.
    fn compare(&mut self) -> usize {
        let known = sequences(&self.submitted, &self.outcomes);
        let now = self.told.blocks();
        assert_eq!(now, reusable(&mut self.engine, &known));
        let gone = self.before.difference(&now).count();
        self.before = now;
        gone
    }
}

/// One engine with pools that are too small, and requests that come and are cancelled at random.
fn schedule(rng: &mut SmallRng, happened: &mut Happened) {
    let base = match rng.random_range(0..2) {
        0 => OPTIONS,
        _ => speculating(OPTIONS),
    };
    let options = EngineOptions {
        host_bytes: [0, 60_000, 200_000, 64 << 20][rng.random_range(0..4)],
        quantum: [4, 1 << 20][rng.random_range(0..2)],
        ..base
    };
    let (at_once, slots) = (rng.random_range(1..5), rng.random_range(1..7));
    let pools = limits(at_once, slots, rng.random_range(9..24));
    let mut observed = Observed::new(engine("tiny-a", pools, options));
    let mut taken: Vec<Snapshot> = Vec::new();
    for id in 0..20 {
        observed.submit(id, random(rng));
        for _ in 0..rng.random_range(0..12) {
            observed.step();
            if rng.random_range(0..4) == 0 {
                happened.removals += observed.compare();
            }
        }
        let engine = &mut observed.engine;
        match rng.random_range(0..16) {
            0 => engine.clear_cache(),
            1 => observed.told = observe(engine),
            2..5 => engine.cancel(RequestId(rng.random_range(0..=id))),
            5..8 => {
                let known = sequences(&observed.submitted, &observed.outcomes);
                let snapshot = engine.snapshot(&known[rng.random_range(0..known.len())]);
                taken.extend(block_on(snapshot).ok());
            }
            8..10 if !taken.is_empty() => {
                let restored = engine.restore(taken.swap_remove(0));
                happened.restored += usize::from(restored.is_ok());
            }
            _ => {}
        }
        happened.removals += observed.compare();
    }
    finish(&mut observed.engine, &mut observed.outcomes);
    happened.removals += observed.compare();
    happened.evictions += observed.engine.occupancy().evictions;
    happened.preemptions += observed.engine.preemptions();
    observed.engine.clear_cache();
    assert!(observed.told.blocks().is_empty());
}

fn schedules(seed: u64) {
    crate::seeds::printed(seed);
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut happened = Happened::default();
    for _ in 0..24 {
        schedule(&mut rng, &mut happened);
    }
    println!("{happened:?}");
    assert!(happened.evictions > 100 && happened.preemptions > 10);
    assert!(happened.removals > 100 && happened.restored > 5);
}

#[test]
fn schedules_of_the_fixed_seed_are_told_exactly() {
    schedules(crate::seeds::FIXED);
}

#[test]
fn schedules_of_the_drawn_seed_are_told_exactly() {
    schedules(crate::seeds::drawn());
}

#[test]
fn a_lost_device_leaves_nothing_stored() {
    let plan = Shared::default();
    let backend = Box::new(Faulty::new(Box::new(CpuBackend::new()), &plan));
    let mut engine = engine_on(backend, "tiny-a", limits(2, 12, 64), OPTIONS);
    let told = observe(&mut engine);
    let prompt = tokens(1, 70);
    let _ = answer(&mut engine, request(prompt.clone(), 4));
    assert_eq!(told.blocks().len(), 70 / BLOCK);
    let calls = plan.lock().unwrap().calls;
    plan.lock().unwrap().fault = Some((calls, Fault::Lost));
    let failed = answer(&mut engine, request(prompt, 4));
    assert!(failed.error.is_some());
    assert!(told.blocks().is_empty());
}

/// Imported caches are stored like those that were prefilled here. The observers are set through the handles of the engines.
#[test]
fn what_is_imported_or_exported_is_told() {
    let (prompt, asked) = (tokens(1, 70), || request(tokens(1, 70), 1));
    let start = || {
        let engine = engine("tiny-a", limits(2, 12, 64), OPTIONS);
        let told = Told::new(root(&engine));
        let handle = EngineHandle::start(engine).unwrap();
        handle.observe_cache(Box::new(told.clone())).unwrap();
        (handle, told)
    };
    let ((from, sent), (to, received)) = (start(), start());
    let header = from.cache_header(prompt.clone()).unwrap();
    let mut import = to.import(header, asked()).unwrap();
    let have = import.reserved().unwrap();
    let unheard = Box::new(|_| ControlFlow::Continue(()));
    let mut stream = from.export(asked(), unheard).unwrap();
    stream.skip_latents(have);
    for record in stream.by_ref() {
        import.put(&record.unwrap()).unwrap();
    }
    let hand_off = stream.hand_off().unwrap().clone();
    let answer = import.finish(Some(hand_off)).unwrap();
    while answer.next().is_some() {}
    for (handle, told) in [(from, sent), (to, received)] {
        let at = position(handle.snapshot(prompt.clone()));
        assert_eq!(at, prompt.len());
        assert_eq!(told.blocks().len(), at / BLOCK);
        handle.clear_cache().unwrap();
        assert!(told.blocks().is_empty());
    }
}
