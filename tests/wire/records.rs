//! Generated caches, and a source that passes them on record by record.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, mpsc};

use kimi_linear::Error;
use kimi_linear::backend::{
    LatentLayout, LatentRecord, Orientation, Shard, StateLayout, StateRecord,
};
use kimi_linear::cache::{CacheHeader, CacheLayout, LayerRecord, LayerTensor};
use kimi_linear::checkpoint::Fingerprint;
use kimi_linear::config::Dtype;
use kimi_linear::error::EngineError;
use kimi_linear::transfer::RecordSource;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// Tokens of latents in one record: two blocks.
pub const CHUNK: usize = 8;

pub const SMALL: CacheLayout = CacheLayout {
    states: StateLayout {
        layers: 3,
        key_heads: 2,
        value_heads: 2,
        key_width: 16,
        value_width: 16,
        taps: 4,
        slots: 4,
    },
    latents: LatentLayout {
        layers: 2,
        latent: 16,
        rope: 4,
        block_tokens: 4,
        blocks: 64,
        dtype: Dtype::F32,
    },
    shard: Shard::WHOLE,
};

/// The shape of the published 48B model.
pub fn published(dtype: Dtype) -> CacheLayout {
    CacheLayout {
        states: StateLayout {
            layers: 20,
            key_heads: 32,
            value_heads: 32,
            key_width: 128,
            value_width: 128,
            taps: 4,
            slots: 1,
        },
        latents: LatentLayout {
            layers: 7,
            latent: 512,
            rope: 64,
            block_tokens: 64,
            blocks: 64,
            dtype,
        },
        shard: Shard::WHOLE,
    }
}

pub fn header(tokens: usize, seed: u64) -> CacheHeader {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    CacheHeader {
        model: Fingerprint(7),
        tokens: (0..tokens).map(|_| random.next_u32() % 1000).collect(),
    }
}

/// Caches of a prompt, with numbers from a seed, in the order of a prefill: latents, then each layer's states.
pub fn records(header: &CacheHeader, layout: &CacheLayout, seed: u64) -> Vec<LayerRecord> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut bytes = |count: usize| {
        let mut bytes = vec![0; count];
        random.fill_bytes(&mut bytes);
        bytes
    };
    let (id, tokens) = (header.id(), header.tokens.len());
    let mut all = Vec::new();
    let LatentLayout {
        latent,
        rope,
        dtype,
        ..
    } = layout.latents;
    for start in (0..tokens).step_by(CHUNK) {
        for layer in 0..layout.latents.layers {
            let count = CHUNK.min(tokens - start);
            let rows = bytes(count * layout.latents.width() * dtype.size());
            let record = LatentRecord {
                latent,
                rope,
                dtype,
                rows,
            };
            all.push(LayerRecord::of_latents(id, layer, start, record));
        }
    }
    let states = &layout.states;
    let mut floats = |count: usize| -> Vec<f32> {
        let bytes = bytes(count);
        bytes.iter().map(|byte| f32::from(*byte) - 128.0).collect()
    };
    for layer in 0..states.layers {
        let state = floats(states.state_len());
        let conv = floats(states.channels() * (states.taps - 1));
        let record = StateRecord {
            orientation: Orientation::KeyValue,
            heads: states.value_heads,
            key_width: states.key_width,
            value_width: states.value_width,
            state,
            channels: states.channels(),
            conv_state: conv,
        };
        all.extend(LayerRecord::of_state(
            id,
            layer,
            tokens,
            states,
            layout.shard,
            &record,
        ));
    }
    all
}

/// Passes records on, and counts how many were taken and whether it still exists.
pub struct Listed {
    records: VecDeque<LayerRecord>,
    taken: Arc<AtomicUsize>,
    fails_at: Option<usize>,
}

impl Listed {
    pub fn new(records: Vec<LayerRecord>) -> Self {
        Self {
            records: records.into(),
            taken: Arc::default(),
            fails_at: None,
        }
    }

    /// It fails after this number of records.
    pub fn failing_at(self, records: usize) -> Self {
        Self {
            fails_at: Some(records),
            ..self
        }
    }

    /// The count of records that were taken; the source has a reference as long as it exists.
    pub fn taken(&self) -> Arc<AtomicUsize> {
        Arc::clone(&self.taken)
    }
}

impl RecordSource for Listed {
    fn skip_latents(&mut self, tokens: usize) {
        self.records
            .retain(|it| it.tensor != LayerTensor::Latents || it.positions.end > tokens);
    }

    fn next_record(&mut self) -> Option<Result<LayerRecord, Arc<Error>>> {
        if self.fails_at == Some(self.taken.load(SeqCst)) {
            return Some(Err(Arc::new(Error::from(EngineError::EmptyPrompt))));
        }
        let record = self.records.pop_front()?;
        self.taken.fetch_add(1, SeqCst);
        Some(Ok(record))
    }
}

/// Returns no record until it is stopped.
pub struct Stuck {
    stopped: mpsc::Receiver<()>,
    stop: mpsc::Sender<()>,
    /// Referenced as long as the source exists.
    _there: Arc<()>,
}

impl Stuck {
    pub fn new(there: &Arc<()>) -> Self {
        let (stop, stopped) = mpsc::channel();
        Self {
            stopped,
            stop,
            _there: Arc::clone(there),
        }
    }
}

impl RecordSource for Stuck {
    fn skip_latents(&mut self, _: usize) {}

    fn next_record(&mut self) -> Option<Result<LayerRecord, Arc<Error>>> {
        self.stopped.recv().unwrap();
        None
    }

    fn stopper(&self) -> Option<Box<dyn FnOnce() + Send>> {
        let stop = self.stop.clone();
        // Fails if the source was dropped before a record was requested.
        Some(Box::new(move || {
            let _ = stop.send(());
        }))
    }
}

/// Checks that the received records are the sent ones, each once, in any order.
#[track_caller]
pub fn assert_same(sent: &[LayerRecord], came: &[LayerRecord]) {
    let sorted = |records: &[LayerRecord]| {
        let mut records = records.to_vec();
        records.sort_by_key(|it| (it.tensor, it.layer, it.positions.start));
        records
    };
    let names = |records: &[LayerRecord]| -> Vec<String> {
        let name = |it: &LayerRecord| format!("{} {:?}", it.name(), it.positions);
        records.iter().map(name).collect()
    };
    let (sent, came) = (sorted(sent), sorted(came));
    assert_eq!(names(&sent), names(&came));
    assert!(sent == came, "a record has other numbers");
}
