//! The receiver's side: records in any order, and a continuation identical to the uninterrupted run's.

use kimi_linear::backend::Shard;
use kimi_linear::cache::{Assembler, CacheHeader, LayerRecord, LayerTensor};
use kimi_linear::checkpoint::Fingerprint;
use kimi_linear::engine::{EngineHandle, Request};
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};

use crate::engine_harness::{self, Outcomes, answer, request, take, tokens};
use crate::{
    BACKENDS, DTYPES, LENGTH, cpu, exported, further, imported, near, on, outcome, prompt, seeds,
    with_pool,
};

#[test]
fn records_in_any_order_continue_to_the_bit() {
    let seed = seeds::printed(seeds::drawn());
    let mut rng = SmallRng::seed_from_u64(seed);
    for name in ["tiny-a", "tiny-128"] {
        let expected = answer(&mut on(cpu, name), further());
        let (header, mut records) = exported(on(cpu, name));
        records.shuffle(&mut rng);
        // Some twice, some cut in two, by heads or by tokens.
        let mut sent: Vec<LayerRecord> =
            records.iter().flat_map(|it| halves(it, &mut rng)).collect();
        sent.extend(records.iter().take(5).cloned());
        sent.shuffle(&mut rng);
        let found = imported(on(cpu, name), &header, &sent);
        assert_eq!(found.said(), expected.said(), "{name}");
        assert_eq!(found.usage.cached_tokens, LENGTH);
    }
}

/// A record, unchanged or in two parts.
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

/// Records of a pool continue in a pool of the same dtype as if nothing had been transferred, to the bit, for any dtype and
/// backend.
#[test]
fn a_pool_of_any_dtype_goes_on_in_another_bit_for_bit() {
    for (name, open) in BACKENDS {
        for dtype in DTYPES {
            let engine = || with_pool(*open, "tiny-a", dtype);
            let expected = answer(&mut engine(), further());
            let (header, records) = exported(engine());
            let found = imported(engine(), &header, &records);
            assert_eq!(found.said(), expected.said(), "{name}, {dtype}");
            assert_eq!(found.usage.cached_tokens, LENGTH);
        }
    }
}

#[test]
fn what_does_not_belong_is_refused_and_the_import_goes_on() {
    let expected = answer(&mut on(cpu, "tiny-a"), further());
    let (header, records) = exported(on(cpu, "tiny-a"));
    let handle = EngineHandle::start(on(cpu, "tiny-a")).unwrap();
    let mut import = handle.import(header.clone(), further()).unwrap();
    assert_eq!(import.reserved().unwrap(), 0);
    let held = handle.occupancy().unwrap();
    assert_eq!((held.slots, held.blocks), (1, (LENGTH + 9).div_ceil(16)));
    let missing = import.missing().unwrap();
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
        // The checksum covers every field, and a record with a new checksum is checked against the pools.
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
            assert_eq!(
                import.missing().unwrap(),
                missing,
                "nothing of it was taken"
            );
        }
        if i + 1 < records.len() {
            import.put(record).unwrap();
        }
    }
    assert_eq!(import.missing().unwrap(), 1);
    import.put(records.last().unwrap()).unwrap();
    assert_eq!(
        outcome(&import.finish(None).unwrap()).said(),
        expected.said()
    );
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
    let short = prompt()[..LENGTH - 1].to_vec();
    let none = CacheHeader {
        tokens: Vec::new(),
        ..header.clone()
    };
    for (header, prompt) in [
        (&header, tokens(2, LENGTH + 9)),
        (&header, short),
        (&none, prompt()),
    ] {
        let error = handle.import(header.clone(), request(prompt, 4));
        let error = error.err().unwrap().to_string();
        assert!(
            error.starts_with("the snapshot's tokens should be "),
            "{error}"
        );
    }
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
        let error = import.finish(None).err().unwrap().to_string();
        assert!(error.ends_with("of the caches are missing"), "{error}");
        // A status query runs in the order of the commands; the cancellation applies in the step after it.
        let _ = outcome(&handle.answer(request(tokens(3, 5), 1)));
        handle.clear_cache().unwrap();
        let left = handle.occupancy().unwrap();
        assert_eq!((left.slots, left.blocks), (0, 0), "after {count} records");
    }
}

/// Imports wait for memory in their order of arrival, and each that is cancelled frees memory for the next.
#[test]
fn an_import_waits_for_room() {
    let expected = answer(&mut on(cpu, "tiny-a"), further());
    let (header, records) = exported(on(cpu, "tiny-a"));
    let handle = EngineHandle::start(on(cpu, "tiny-a")).unwrap();
    let mut imports: Vec<_> = (0..5)
        .map(|_| handle.import(header.clone(), further()).unwrap())
        .collect();
    for import in &mut imports[..3] {
        import.reserved().unwrap();
    }
    let status = handle.status().unwrap();
    assert_eq!(status.waiting, 2, "40 blocks hold three prompts of eleven");
    drop(imports.remove(0));
    let mut fourth = imports.remove(2);
    fourth.reserved().unwrap();
    assert_eq!(handle.status().unwrap().waiting, 1);
    // The last one waits until all others are cancelled or finished.
    let mut last = imports.remove(2);
    for record in &records {
        fourth.put(record).unwrap();
    }
    assert_eq!(
        outcome(&fourth.finish(None).unwrap()).said(),
        expected.said()
    );
    for record in &records {
        last.put(record).unwrap();
    }
    drop(imports);
    assert_eq!(outcome(&last.finish(None).unwrap()).said(), expected.said());
    handle.clear_cache().unwrap();
    let left = handle.occupancy().unwrap();
    assert_eq!((left.slots, left.blocks, left.host_bytes), (0, 0, 0));
}

/// An import that can never fit is refused at once, and does not wait.
#[test]
fn an_import_that_could_never_fit_is_refused() {
    let long = tokens(7, 41 * engine_harness::BLOCK);
    let engine = on(cpu, "tiny-a");
    let header = engine.cache_header(long[..100].to_vec());
    let handle = EngineHandle::start(engine).unwrap();
    let error = handle.import(header, request(long, 4)).err().unwrap();
    let expected = "the prompt has 656 tokens, but the context holds 640";
    assert_eq!(error.to_string(), expected);
}

/// Memory that is reserved for caches is not available to other requests, which wait for it and then have the same answers.
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
        // It fits in the seven blocks that are left, until it has grown by this number of tokens.
        (cold(request(tokens(4, 60), 80)), 53),
    ];
    for (other, before) in others {
        let expected = answer(&mut on(cpu, "tiny-a"), other.clone());
        // Imports that found these latents in the cache would share their blocks, and need less memory.
        handle.clear_cache().unwrap();
        let import = || handle.import(header.clone(), further()).unwrap();
        let mut reserved: Vec<_> = (0..3).map(|_| import()).collect();
        for import in &mut reserved {
            import.reserved().unwrap();
        }
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
        let imported = outcome(&import.finish(None).unwrap());
        assert_eq!(imported.usage.cached_tokens, LENGTH);
        drop(reserved);
        let found = more(usize::MAX);
        let found = found.values().next().unwrap();
        assert_eq!(found.said(), expected.said());
    }
}

/// A model's caches from one backend to another, through all records, for any dtypes of the pools: the receiver continues
/// from the same bits as a snapshot of the sender contains.
#[cfg(all(feature = "wgpu", feature = "cuda"))]
#[test]
fn caches_move_between_backends() {
    use kimi_linear::config::Dtype::{Bf16, F16, F32};
    use pollster::block_on;

    use crate::backends::{cuda, wgpu};

    let routes: [(&str, crate::Open, _, crate::Open, _); 6] = [
        ("cpu to wgpu", cpu, F32, wgpu, F32),
        ("wgpu to cpu", wgpu, F32, cpu, F32),
        ("cpu in f16 to wgpu in bf16", cpu, F16, wgpu, Bf16),
        ("cuda-emulated to wgpu", cuda, Bf16, wgpu, F32),
        ("wgpu to cuda-emulated", wgpu, F32, cuda, Bf16),
        ("wgpu in f16 to cuda-emulated in f16", wgpu, F16, cuda, F16),
    ];
    for (what, open_from, from, open_to, to) in routes {
        let name = "tiny-128";
        let mut sender = with_pool(open_from, name, from);
        let _ = answer(&mut sender, request(prompt(), 0));
        let snapshot = block_on(sender.snapshot(&prompt())).unwrap();
        let mut receiver = with_pool(open_to, name, to);
        receiver.restore(snapshot).unwrap();
        let expected = answer(&mut receiver, further());
        let (header, records) = exported(with_pool(open_from, name, from));
        // They are in the sender's dtype.
        let mut latents = records
            .iter()
            .filter(|it| it.tensor == LayerTensor::Latents);
        assert!(latents.all(|it| it.dtype == from), "{what}");
        let found = imported(with_pool(open_to, name, to), &header, &records);
        assert_eq!(found.said(), expected.said(), "{what}");
        assert_eq!(found.usage.cached_tokens, LENGTH);
    }
}

/// One backend's caches on another that computes in f32: caches of either f32 backend equal its own except for the order of
/// sums; those of a bf16 device have the same meaning on both f32 backends.
#[cfg(all(feature = "wgpu", feature = "cuda"))]
#[test]
fn caches_of_one_backend_mean_the_same_to_another() {
    use crate::backends::{cuda, wgpu};

    let name = "tiny-128";
    let (header, records) = exported(on(cpu, name));
    near(
        &answer(&mut on(wgpu, name), further()),
        &imported(on(wgpu, name), &header, &records),
    );
    let (header, records) = exported(on(wgpu, name));
    near(
        &answer(&mut on(cpu, name), further()),
        &imported(on(cpu, name), &header, &records),
    );
    let (header, records) = exported(on(cuda, name));
    near(
        &imported(on(cpu, name), &header, &records),
        &imported(on(wgpu, name), &header, &records),
    );
}

/// Records of half of the heads each, as ranks of another engine may send them, are received by an engine that has all; and
/// each of two such ranks receives its heads of what the whole model sent.
#[test]
fn heads_are_cut_anew_where_ranks_differ() {
    let whole = exported(on(cpu, "tiny-a"));
    let layout = on(cpu, "tiny-a").cache_layout();
    let mut both = Vec::new();
    for rank in 0..2 {
        let mut states = layout.states;
        states.key_heads /= 2;
        states.value_heads /= 2;
        let shard = Shard { rank, ranks: 2 };
        let own = kimi_linear::cache::CacheLayout {
            states,
            shard,
            ..layout
        };
        let mut assembler = Assembler::new(whole.0.clone(), own);
        let parts = whole.1.iter().flat_map(|it| assembler.put(it).unwrap());
        let parts: Vec<_> = parts.collect();
        assert_eq!(assembler.missing(), 0);
        let (id, end) = (whole.0.id(), whole.0.tokens.len());
        for part in parts {
            if let kimi_linear::cache::Assembled::State { layer, record } = part {
                let records = LayerRecord::of_state(id, layer, end, &states, shard, &record);
                both.extend(records);
            }
        }
    }
    let states = both.len();
    let latents = whole
        .1
        .iter()
        .filter(|record| record.tensor == LayerTensor::Latents);
    both.extend(latents.cloned());
    assert!(states > 0 && both.len() > states);
    let expected = imported(on(cpu, "tiny-a"), &whole.0, &whole.1);
    let found = imported(on(cpu, "tiny-a"), &whole.0, &both);
    assert_eq!(expected, found);
}

/// If the engine is gone, calls return an error and do not wait.
#[test]
fn an_engine_that_stops_ends_streams_and_imports() {
    let handle = EngineHandle::start(on(cpu, "tiny-a")).unwrap();
    let (header, _) = exported(on(cpu, "tiny-a"));
    let import = handle.import(header, further()).unwrap();
    drop(handle);
    let error = import.finish(None).err().unwrap();
    assert!(
        error.to_string().ends_with("of the caches are missing"),
        "{error}"
    );
}
