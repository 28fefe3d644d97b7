//! Caches that travel: out of one engine layer by layer while a prompt is prefilled, into another in any order.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

#[cfg(feature = "cuda")]
#[path = "common/emulated.rs"]
mod emulated;
mod engine_harness;
#[path = "common/seeds.rs"]
mod seeds;

use std::sync::{Arc, Mutex};

use engine_harness::{
    OPTIONS, Outcome, Outcomes, answer, collect, engine, engine_on, limits, request, take, tokens,
};
use kimi_linear::backend::cpu::CpuBackend;
use kimi_linear::backend::*;
use kimi_linear::cache::{Assembler, CacheHeader, LayerRecord, LayerTensor};
use kimi_linear::checkpoint::Fingerprint;
use kimi_linear::engine::{Engine, EngineHandle, ExportStream, Request, RequestId};
use kimi_linear::error::Error;
use pollster::block_on;
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};

/// Tokens whose caches travel: of several segments, the last of which ends inside a block.
const LENGTH: usize = 165;

/// Log-probabilities of one f32 backend against another's.
const F32: f32 = 1e-4;
/// Those of a bf16 device's caches against f32 ones.
const BF16: f32 = 5e-2;

type Open = fn() -> Box<dyn Backend>;

fn cpu() -> Box<dyn Backend> {
    Box::new(CpuBackend::new())
}

#[cfg(feature = "wgpu")]
fn wgpu() -> Box<dyn Backend> {
    let options = kimi_linear::backend::wgpu::Options::default();
    let backend = kimi_linear::backend::wgpu::WgpuBackend::with_options(options);
    Box::new(backend.unwrap_or_else(|error| {
        panic!("{error}. These tests need a Vulkan driver: apt-get install mesa-vulkan-drivers libvulkan1")
    }))
}

#[cfg(feature = "cuda")]
fn cuda() -> Box<dyn Backend> {
    emulated::open(&emulated::ORDERS[..1])
}

const BACKENDS: &[(&str, Open)] = &[
    ("cpu", cpu),
    #[cfg(feature = "wgpu")]
    ("wgpu", wgpu),
    #[cfg(feature = "cuda")]
    ("cuda-emulated", cuda),
];

fn on(open: Open, name: &str) -> Engine {
    engine_on(open(), name, limits(2, 5, 40), OPTIONS)
}

fn prompt() -> Vec<u32> {
    tokens(1, LENGTH)
}

/// What goes on from the caches, computed where they are: cut where they end, so that it is the same arithmetic.
fn further() -> Request {
    Request {
        turn_ends: vec![LENGTH],
        ..request([prompt(), tokens(2, 9)].concat(), 8)
    }
}

/// All records of an export, and what they are of.
fn exported(engine: Engine) -> (CacheHeader, Vec<LayerRecord>) {
    let handle = EngineHandle::start(engine).unwrap();
    let stream = handle.export(request(prompt(), 0)).unwrap();
    let header = stream.header().clone();
    (header, stream.map(|record| record.unwrap()).collect())
}

fn outcome(answer: &kimi_linear::engine::Answer) -> Outcome {
    let mut outcomes = Outcomes::new();
    while let Some(event) = answer.next() {
        take([(answer.id(), event)], &mut outcomes);
    }
    outcomes.remove(&(answer.id(), 0)).unwrap()
}

/// Imports the records as they are, and answers.
fn imported(engine: Engine, header: &CacheHeader, records: &[LayerRecord]) -> Outcome {
    let handle = EngineHandle::start(engine).unwrap();
    let mut import = handle.import(header.clone(), further()).unwrap();
    for record in records {
        import.put(record).unwrap();
    }
    outcome(&import.finish().unwrap())
}

/// Calls a function before each submission, with the names of its operations.
struct Watched {
    inner: Box<dyn Backend>,
    before: Before,
}

type Before = Arc<Mutex<dyn FnMut(&[&'static str]) + Send>>;

struct WatchedStep {
    inner: Box<dyn Step>,
    before: Before,
}

macro_rules! passed_on {
    ($($name:ident($($argument:ident: $kind:ty),*) -> $result:ty;)*) => {
        $(fn $name(&mut self, $($argument: $kind),*) -> $result {
            self.inner.$name($($argument),*)
        })*
    };
}

impl Backend for Watched {
    fn device(&self) -> &Device {
        self.inner.device()
    }

    fn shard(&self) -> Shard {
        self.inner.shard()
    }

    passed_on! {
        weight(source: WeightSource) -> Result<Weight>;
        tensor(rows: Rows, capacity: usize, width: usize, element: Element) -> Result<Tensor>;
        write_tensor(tensor: Tensor, values: &TensorValues) -> Result<()>;
        read_tensor(tensor: Tensor, rows: usize) -> Ticket<TensorValues>;
        state_pool(layout: StateLayout) -> Result<StatePool>;
        latent_pool(layout: LatentLayout) -> Result<LatentPool>;
        read_state(pool: &StatePool, layer: usize, slot: Slot) -> Ticket<StateRecord>;
        write_state(pool: &StatePool, layer: usize, slot: Slot, record: &StateRecord) -> Result<()>;
        read_latents(pool: &LatentPool, layer: usize, block: Block, tokens: usize) -> Ticket<LatentRecord>;
        write_latents(pool: &LatentPool, layer: usize, block: Block, record: &LatentRecord) -> Result<()>;
    }

    fn compile(&mut self, program: &Program, capacity: Capacity) -> Result<Box<dyn Step>> {
        Ok(Box::new(WatchedStep {
            inner: self.inner.compile(program, capacity)?,
            before: Arc::clone(&self.before),
        }))
    }
}

impl Step for WatchedStep {
    fn operations(&self) -> &[&'static str] {
        self.inner.operations()
    }

    fn time(&mut self, on: bool) -> Result<()> {
        self.inner.time(on)
    }

    fn submit(&mut self, batch: &Batch) -> Result<Ticket<StepOutput>> {
        (self.before.lock().unwrap())(self.inner.operations());
        self.inner.submit(batch)
    }
}

/// While the last layer's part is still to be submitted, the first layer's record is in the reader's hands.
#[test]
fn the_first_layer_leaves_before_the_last_is_computed() {
    for (name, open) in BACKENDS {
        let stream = Arc::<Mutex<Option<ExportStream>>>::default();
        let seen = Arc::<Mutex<Vec<LayerRecord>>>::default();
        let (reader, records) = (Arc::clone(&stream), Arc::clone(&seen));
        let mut parts = 0;
        let before = move |operations: &[&'static str]| {
            parts += 1;
            if operations.contains(&"select") && parts > 1 {
                let mut stream = reader.lock().unwrap();
                while let Some(record) = stream.as_mut().unwrap().try_next() {
                    records.lock().unwrap().push(record.unwrap());
                }
            }
        };
        let backend = Box::new(Watched {
            inner: open(),
            before: Arc::new(Mutex::new(before)),
        });
        // A prompt of one segment: nothing of it is there before its only pass.
        let mut engine = engine_on(backend, "tiny-a", limits(2, 5, 40), OPTIONS);
        let short = request(tokens(1, 40), 0);
        *stream.lock().unwrap() = Some(engine.export(RequestId(1), short, 64).unwrap());
        while block_on(engine.step()) {}
        let seen = seen.lock().unwrap();
        let layers: Vec<_> = seen.iter().map(|it| (it.tensor, it.layer)).collect();
        assert_eq!(layers[0], (LayerTensor::State, 0), "{name}: {layers:?}");
        let rest = stream.lock().unwrap().take().unwrap();
        let rest: Vec<LayerRecord> = rest.map(|record| record.unwrap()).collect();
        assert!(!rest.is_empty(), "{name}: all had left");
        // And they are final: the same as read when all was over.
        let after = exported_short(on(*open, "tiny-a"));
        let mut all = [seen.clone(), rest].concat();
        all.sort_by_key(|it| (it.tensor, it.layer, it.positions.start));
        assert_eq!(all, after, "{name}");
    }
}

/// The caches of the same prompt after one step of the whole pass: from a snapshot.
fn exported_short(mut engine: Engine) -> Vec<LayerRecord> {
    let prompt = tokens(1, 40);
    let _ = answer(&mut engine, request(prompt.clone(), 0));
    let mut records = block_on(engine.snapshot(&prompt)).unwrap().records();
    records.sort_by_key(|it| (it.tensor, it.layer, it.positions.start));
    records
}

#[test]
fn records_in_any_order_continue_to_the_bit() {
    let seed = seeds::printed(seeds::drawn());
    let mut rng = SmallRng::seed_from_u64(seed);
    for name in ["tiny-a", "tiny-128"] {
        let expected = answer(&mut on(cpu, name), further());
        let (header, mut records) = exported(on(cpu, name));
        records.shuffle(&mut rng);
        // Some twice, some cut in two: by heads or by tokens.
        let mut sent: Vec<LayerRecord> =
            records.iter().flat_map(|it| halves(it, &mut rng)).collect();
        sent.extend(records.iter().take(5).cloned());
        sent.shuffle(&mut rng);
        let found = imported(on(cpu, name), &header, &sent);
        assert_eq!(found.said(), expected.said(), "{name}");
        assert_eq!(found.usage.cached_tokens, LENGTH);
    }
}

/// A record as it is, or in two parts.
fn halves(record: &LayerRecord, rng: &mut SmallRng) -> Vec<LayerRecord> {
    let latents = record.tensor == LayerTensor::Latents;
    let range = if latents {
        record.positions.clone()
    } else {
        record.heads.clone()
    };
    if range.len() < 2 || rng.random_range(0..2) == 0 {
        return vec![record.clone()];
    }
    let part = record.bytes.len() / range.len();
    let middle = rng.random_range(1..range.len());
    let cut = |from: usize, to: usize| {
        let mut half = record.clone();
        let count = record.shape[0] / range.len();
        half.shape[0] = count * (to - from);
        half.bytes = record.bytes[from * part..to * part].to_vec();
        let range = range.start + from..range.start + to;
        if latents {
            half.positions = range;
        } else {
            half.heads = range;
        }
        half.sealed()
    };
    vec![cut(0, middle), cut(middle, range.len())]
}

#[test]
fn what_does_not_belong_is_refused_and_the_import_goes_on() {
    let expected = answer(&mut on(cpu, "tiny-a"), further());
    let (header, records) = exported(on(cpu, "tiny-a"));
    let handle = EngineHandle::start(on(cpu, "tiny-a")).unwrap();
    let mut import = handle.import(header.clone(), further()).unwrap();
    let held = handle.occupancy().unwrap();
    assert_eq!((held.slots, held.blocks), (1, (LENGTH + 9).div_ceil(16)));
    let missing = import.missing();
    for (i, record) in records.iter().enumerate() {
        let bad = |change: &dyn Fn(&mut LayerRecord)| {
            let mut bad = record.clone();
            change(&mut bad);
            bad
        };
        let mut damaged = bad(&|it| it.bytes[7] ^= 1);
        let error = import.put(&damaged).unwrap_err().to_string();
        assert!(
            error.contains("is damaged: its checksum should be"),
            "{error}"
        );
        // Every field is under the checksum, and one that is sealed again is held against the pools.
        damaged = bad(&|it| it.layer += 100);
        assert!(import.put(&damaged).is_err());
        let refused = [
            (bad(&|it| it.id ^= 1), "model and tokens of a record"),
            (bad(&|it| it.layer += 100), "layer of a record"),
            (bad(&|it| it.shape[1] += 1), "bytes of the"),
            (bad(&|it| it.positions.end += 1000), "positions of the"),
        ];
        for (bad, part) in refused {
            let error = import.put(&bad.sealed()).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
        if i == 0 {
            assert_eq!(import.missing(), missing, "nothing of it was taken");
        }
        if i + 1 < records.len() {
            import.put(record).unwrap();
        }
    }
    assert_eq!(import.missing(), 1);
    import.put(records.last().unwrap()).unwrap();
    assert_eq!(outcome(&import.finish().unwrap()).said(), expected.said());
    // Other models, and prompts that do not begin with the tokens.
    let other = CacheHeader {
        model: Fingerprint(1),
        ..header.clone()
    };
    let error = handle.import(other, further()).err().unwrap().to_string();
    assert!(
        error.starts_with("the snapshot's model should be "),
        "{error}"
    );
    let error = handle
        .import(header, request(prompt(), 4))
        .err()
        .unwrap()
        .to_string();
    assert!(
        error.starts_with("the snapshot's tokens should be "),
        "{error}"
    );
}

#[test]
fn an_import_that_is_given_up_leaves_nothing() {
    let (header, records) = exported(on(cpu, "tiny-a"));
    let handle = EngineHandle::start(on(cpu, "tiny-a")).unwrap();
    for count in [0, 1, records.len() / 2, records.len() - 1] {
        let mut import = handle.import(header.clone(), further()).unwrap();
        for record in &records[..count] {
            import.put(record).unwrap();
        }
        let error = import.finish().err().unwrap().to_string();
        assert!(error.ends_with("of the caches are missing"), "{error}");
        // A status is asked for in the order of the commands; the cancellation takes effect in the step after it.
        let _ = outcome(&handle.answer(request(tokens(3, 5), 1)));
        handle.clear_cache().unwrap();
        let left = handle.occupancy().unwrap();
        assert_eq!((left.slots, left.blocks), (0, 0), "after {count} records");
    }
    // More than there is room for is refused at once.
    let reserved: Vec<_> =
        std::iter::from_fn(|| handle.import(header.clone(), further()).ok()).collect();
    assert_eq!(reserved.len(), 3, "40 blocks hold three prompts of eleven");
    let error = handle.import(header, further()).err().unwrap().to_string();
    assert!(
        error.contains("are free for caches of a prompt of 174 tokens"),
        "{error}"
    );
}

/// Places that are reserved for caches are missed by others, which wait for them and then answer as they would have.
#[test]
fn requests_wait_for_what_imports_reserve() {
    let (header, records) = exported(on(cpu, "tiny-a"));
    let handle = EngineHandle::start(on(cpu, "tiny-a")).unwrap();
    let cold = |request| Request {
        reuse: false,
        ..request
    };
    let others = [
        (cold(request(tokens(3, 200), 5)), 0),
        // It fits in the seven blocks that are left, until it has grown by so many tokens.
        (cold(request(tokens(4, 60), 80)), 53),
    ];
    for (other, before) in others {
        let expected = answer(&mut on(cpu, "tiny-a"), other.clone());
        let import = || handle.import(header.clone(), further()).unwrap();
        let mut reserved: Vec<_> = (0..3).map(|_| import()).collect();
        let found = handle.answer(other);
        let mut outcomes = Outcomes::new();
        let mut more = |count: usize| {
            let said = |all: &Outcomes| all.values().map(|it| it.tokens.len()).sum::<usize>();
            while said(&outcomes) < count
                && let Some(event) = found.next()
            {
                take([(found.id(), event)], &mut outcomes);
            }
            outcomes.clone()
        };
        more(before);
        while handle.status().unwrap().waiting == 0 {}
        let mut import = reserved.remove(0);
        for record in &records {
            import.put(record).unwrap();
        }
        let imported = outcome(&import.finish().unwrap());
        assert_eq!(imported.usage.cached_tokens, LENGTH);
        drop(reserved);
        let found = more(usize::MAX);
        let found = found.values().next().unwrap();
        assert_eq!(found.said(), expected.said());
    }
}

/// A reader that takes nothing stops nobody, and finds all of it afterwards; one that goes away leaves nothing.
#[test]
fn a_slow_reader_stalls_nobody_and_a_lost_one_leaks_nothing() {
    let known = exported(on(cpu, "tiny-a")).1;
    let mut engine = engine("tiny-a", limits(2, 3, 24), OPTIONS);
    let mut alone = on(cpu, "tiny-a");
    let mut stream = engine
        .export(RequestId(1), request(prompt(), 0), 1)
        .unwrap();
    let mut outcomes = Outcomes::new();
    // These need all slots and blocks.
    let others = || {
        (2..6).map(|id| {
            (
                id,
                Request {
                    reuse: false,
                    ..request(tokens(id, 200), 30)
                },
            )
        })
    };
    for (id, request) in others() {
        engine.submit(RequestId(id), request).unwrap();
    }
    while block_on(engine.step()) {
        let found = engine.occupancy();
        let used = (
            found.slots - found.idle_slots,
            found.blocks - found.idle_blocks,
        );
        assert_eq!(used, engine.held());
    }
    collect(&mut engine, &mut outcomes);
    for (id, request) in others() {
        let found = &outcomes[&(RequestId(id), 0)];
        assert_eq!(
            found.said(),
            answer(&mut alone, request).said(),
            "request {id}"
        );
    }
    let mut records = Vec::new();
    loop {
        while let Some(record) = stream.try_next() {
            records.push(record.unwrap());
        }
        if records.len() == known.len() {
            break;
        }
        engine.send_exports();
    }
    assert!(stream.next().is_none());
    assert_eq!(records, known);

    let stream = engine
        .export(RequestId(1), request(tokens(9, LENGTH), 0), 1)
        .unwrap();
    while block_on(engine.step()) {}
    assert!(engine.held() != (0, 0), "what found no room is held");
    drop(stream);
    engine.send_exports();
    assert_eq!(engine.held(), (0, 0));
    engine.clear_cache();
    let left = engine.occupancy();
    assert_eq!((left.slots, left.blocks, left.host_bytes), (0, 0, 0));
}

#[test]
fn a_request_that_fails_ends_its_stream_with_the_error() {
    let mut engine = on(cpu, "tiny-a");
    let mut stream = engine
        .export(RequestId(1), request(prompt(), 0), 64)
        .unwrap();
    block_on(engine.step());
    engine.cancel(RequestId(1));
    block_on(engine.step());
    let last = stream.by_ref().last().unwrap();
    assert_eq!(
        last.unwrap_err().to_string(),
        "the request whose caches were sent was cancelled"
    );
}

/// A model's caches from one backend to another, through all records.
#[cfg(all(feature = "wgpu", feature = "cuda"))]
#[test]
fn caches_move_between_backends() {
    let routes: [(&str, Open, &str, Open, f32); 4] = [
        ("cpu", cpu, "wgpu", wgpu, F32),
        ("wgpu", wgpu, "cpu", cpu, F32),
        ("cuda-emulated", cuda, "wgpu", wgpu, BF16),
        ("wgpu", wgpu, "cuda-emulated", cuda, BF16),
    ];
    for (from, open_from, to, open_to, bound) in routes {
        let what = format!("{from} to {to}");
        let (header, records) = exported(on(open_from, "tiny-128"));
        // They are as the sender keeps them.
        let dtype = open_from().device().cache;
        let latents = records
            .iter()
            .filter(|it| it.tensor == LayerTensor::Latents);
        assert!(latents.clone().count() > 0 && latents.clone().all(|it| it.dtype == dtype));
        let found = imported(on(open_to, "tiny-128"), &header, &records);
        let expected = answer(&mut on(open_to, "tiny-128"), further());
        assert_eq!(found.usage.cached_tokens, LENGTH);
        for (i, (a, b)) in expected
            .likelihoods
            .iter()
            .zip(&found.likelihoods)
            .enumerate()
        {
            let (a, b) = (a.as_ref().unwrap(), b.as_ref().unwrap());
            let difference = (a.top[0].1 - b.top[0].1).abs();
            assert!(difference <= bound, "{what}, token {i}: {difference}");
            if a.top[0].1 - a.top[1].1 <= 2.0 * bound {
                break;
            }
            assert_eq!(expected.tokens[i], found.tokens[i], "{what}, token {i}");
        }
    }
}

/// Two ranks send their own heads, and one that holds all of them takes both; and the other way round.
#[test]
fn heads_are_cut_anew_where_ranks_differ() {
    let whole = exported(on(cpu, "tiny-a"));
    let ranks: Vec<_> = std::thread::scope(|scope| {
        let export = |collective| {
            let backend = Box::new(CpuBackend::with_collective(Arc::new(collective)));
            scope.spawn(move || exported(engine_on(backend, "tiny-a", limits(2, 5, 40), OPTIONS)))
        };
        let threads: Vec<_> = Threads::new(2).into_iter().map(export).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    });
    let both: Vec<LayerRecord> = ranks.iter().flat_map(|rank| rank.1.clone()).collect();
    assert_eq!(ranks[0].0, whole.0, "the same model and tokens");
    let expected = answer(&mut on(cpu, "tiny-a"), further());
    let found = imported(on(cpu, "tiny-a"), &whole.0, &both);
    near(&expected, &found);

    // Each of two ranks takes its heads of what the whole one sent, and has what it would have sent itself.
    let layout = on(cpu, "tiny-a").cache_layout();
    for (rank, sent) in ranks.iter().enumerate() {
        let mut states = layout.states;
        states.key_heads /= 2;
        states.value_heads /= 2;
        let shard = Shard { rank, ranks: 2 };
        let own = kimi_linear::cache::CacheLayout {
            states,
            shard,
            ..layout
        };
        let parts = |records: &[LayerRecord]| {
            let mut assembler = Assembler::new(whole.0.clone(), own);
            let parts = records.iter().flat_map(|it| assembler.put(it).unwrap());
            let parts: Vec<_> = parts.collect();
            assert_eq!(assembler.missing(), 0);
            parts
        };
        let (cut, itself) = (parts(&whole.1), parts(&sent.1));
        assert_eq!(cut.len(), itself.len());
        for (cut, itself) in cut.iter().zip(&itself) {
            use kimi_linear::cache::Assembled::{Latents, State};
            match (cut, itself) {
                (State { record: a, .. }, State { record: b, .. }) => {
                    engine_harness::common::close("state", &a.state, &b.state, 1e-5);
                    engine_harness::common::close("conv", &a.conv_state, &b.conv_state, 1e-5);
                }
                (Latents { record: a, .. }, Latents { record: b, .. }) => {
                    engine_harness::common::close("latents", &a.to_f32(), &b.to_f32(), 1e-5);
                }
                other => panic!("{other:?}"),
            }
        }
    }
}

fn near(expected: &Outcome, found: &Outcome) {
    assert_eq!(expected.tokens, found.tokens);
    for (a, b) in expected.likelihoods.iter().zip(&found.likelihoods) {
        let (a, b) = (a.as_ref().unwrap().logprob, b.as_ref().unwrap().logprob);
        assert!((a - b).abs() <= F32, "{a} and {b}");
    }
}

/// An engine that is gone is said, not waited for.
#[test]
fn an_engine_that_stops_ends_streams_and_imports() {
    let handle = EngineHandle::start(on(cpu, "tiny-a")).unwrap();
    let (header, _) = exported(on(cpu, "tiny-a"));
    let import = handle.import(header, further()).unwrap();
    drop(handle);
    let error: Error = import.finish().err().unwrap().into();
    assert!(
        error.to_string().ends_with("of the caches are missing"),
        "{error}"
    );
}
