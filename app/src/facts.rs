//! Facts about the loaded model: its shape, its device, the size of its pools.

use kimi_linear::backend::Device;
use kimi_linear::config::{Dtype, Memory, MemoryRequest, ModelConfig};
use kimi_linear::engine::EngineSizes;
use kimi_linear::model::{TraceChoice, TraceHead};

/// A loaded model.
#[derive(Clone, Debug)]
pub struct ModelFacts {
    /// Its display name: that of the folder, or of the demo model.
    pub name: String,
    /// Its shape.
    pub config: ModelConfig,
    /// The device that it runs on.
    pub device: Device,
    /// Maximum tokens of a conversation.
    pub context: usize,
    /// Size of the pools in bytes.
    pub memory: Memory,
}

impl ModelFacts {
    /// The initially selected heads: the first of the middle KDA layer and of the last MLA layer.
    #[must_use]
    pub fn first_choice(&self) -> TraceChoice {
        let kda: Vec<usize> = self.config.kda_layers().collect();
        let head = |layer: usize| TraceHead { layer, head: 0 };
        TraceChoice {
            kda: kda.get(kda.len() / 2).copied().map(head),
            mla: self.config.mla_layers().last().map(head),
            vectors: true,
        }
    }
}

/// State slots in addition to the running one, for checkpoints of several chats.
const CHECKPOINTS: usize = 6;

/// The sizes of the app's engine: one running sequence, and checkpoints for the others.
#[must_use]
pub fn sizes(context: usize) -> EngineSizes {
    EngineSizes {
        checkpoints: CHECKPOINTS,
        ..EngineSizes::one(context)
    }
}

/// The memory that a model needs on a device, before it is loaded, for conversations of this length. `stored` is the size of
/// its weights if they exist; otherwise they are estimated from the configuration's dtype.
#[must_use]
pub fn memory(
    config: &ModelConfig,
    device: &Device,
    context: usize,
    stored: Option<u64>,
) -> Memory {
    let sizes = sizes(context.min(config.model_max_length));
    let limits = sizes.limits(device.cache);
    let mut memory = config.memory(&MemoryRequest {
        context: limits.blocks * limits.block_tokens,
        sequences: 1,
        spare_slots: limits.slots - 1,
        weights: config.weight_bytes(config.dtype.unwrap_or(Dtype::Bf16)),
        cache: device.cache,
        conv_states: Dtype::F32,
        block_tokens: limits.block_tokens,
        step_tokens: limits.step.tokens,
    });
    if let Some(stored) = stored {
        memory.weights = stored;
    }
    memory
}

/// Whether a model will fit on a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fit {
    /// It fits, with memory to spare.
    Fits,
    /// It takes more than nine tenths of the memory: other programs on the device may prevent it.
    Tight,
    /// It does not fit.
    TooLarge,
    /// The device does not report its memory.
    Unknown,
}

impl Fit {
    /// Compares an estimate with the memory that a device reports.
    #[must_use]
    pub fn of(memory: &Memory, device: &Device) -> Self {
        let Some(there) = device.memory_bytes else {
            return Self::Unknown;
        };
        let needed = memory.total();
        if needed > there {
            Self::TooLarge
        } else if needed > there / 10 * 9 {
            Self::Tight
        } else {
            Self::Fits
        }
    }
}

/// A size in binary units for display.
#[must_use]
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 {
        format!("{count} B")
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}
