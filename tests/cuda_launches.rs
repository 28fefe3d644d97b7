//! The launches of a step of the published shape, counted from its commands: no GPU is needed, and nothing runs.
//!
//! The counts are in `docs/performance/hopper.md`; `KIMI_BLESS=1` writes them again.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;
use std::sync::{Arc, Mutex};

use kimi_linear::backend::cuda::CudaBackend;
use kimi_linear::backend::cuda::machine::{Answers, Buffer, Command, Machine, Memory, Work};
use kimi_linear::backend::{
    Backend, Batch, Block, Capacity, Device, Draw, DrawCapacity, OutputRow, Result, Segment, Slot,
    Ticket,
};
use kimi_linear::config::{Dtype, ModelConfig};
use kimi_linear::model::{Limits, Model, StepOptions};

const BLOCK_TOKENS: usize = 64;
const CONTEXT: usize = 4096;
const PROMPT: usize = 8192;
const SEQUENCES: usize = 64;

/// A device that records the last submission's commands and does nothing.
struct Ledger {
    device: Device,
    last: Mutex<Vec<String>>,
}

/// Memory that is never read.
struct Nowhere;

impl Memory for Nowhere {}

impl Machine for Ledger {
    fn device(&self) -> &Device {
        &self.device
    }

    fn allocate(&self, _what: &str, _bytes: u64) -> Result<Box<dyn Memory>> {
        Ok(Box::new(Nowhere))
    }

    fn write(&self, _buffer: &Buffer, _start: u64, _bytes: &[u8]) -> Result<()> {
        Ok(())
    }

    fn submit(&self, work: &Work<'_>) -> Result<Ticket<Answers>> {
        let name = |command: &Command| match command {
            Command::Launch(launch) => format!("`{}`", launch.kernel()),
            Command::Product(_) => "product by cuBLASLt".to_owned(),
            Command::Copy { .. } => "copy".to_owned(),
            Command::Collective(_) => "collective".to_owned(),
        };
        *self.last.lock().unwrap() = work.commands.iter().map(name).collect();
        let bytes = work.answers.iter().map(|place| place.range().len()).sum();
        Ok(Ticket::ready(Ok(Answers {
            bytes: vec![0; bytes],
            milliseconds: Vec::new(),
        })))
    }

    fn forget(&self, _step: u64) {}
}

fn segment(sequence: usize, position: usize, length: usize) -> Segment {
    let each = PROMPT / BLOCK_TOKENS;
    let blocks = (position + length).div_ceil(BLOCK_TOKENS);
    Segment {
        length,
        position,
        slot_in: (position > 0).then_some(Slot(sequence as u32)),
        slot_out: Slot(sequence as u32),
        checkpoints: Vec::new(),
        blocks: (0..blocks)
            .map(|block| Block((sequence * each + block) as u32))
            .collect(),
    }
}

fn batch(segments: Vec<Segment>) -> Batch {
    let tokens: usize = segments.iter().map(|segment| segment.length).sum();
    let mut end = 0;
    let outputs = segments.iter().map(|segment| {
        end += segment.length;
        OutputRow {
            row: end - 1,
            target: None,
        }
    });
    let rows = segments.len();
    // As most clients sample.
    let draw = |row| Draw {
        temperature: 1.0,
        ..Draw::best(row)
    };
    Batch {
        tokens: vec![1; tokens],
        outputs: outputs.collect(),
        segments,
        draws: (0..rows).map(draw).collect(),
        fed: Vec::new(),
    }
}

/// How often each kernel is launched in a step over these segments.
fn counted(segments: Vec<Segment>) -> BTreeMap<String, usize> {
    let config = ModelConfig::published().unwrap();
    let ledger = Arc::new(Ledger {
        device: Device {
            backend: "cuda",
            index: 0,
            name: "a ledger".to_owned(),
            memory_bytes: None,
            precision: Dtype::Bf16,
            cache: Dtype::Bf16,
        },
        last: Mutex::default(),
    });
    let batch = batch(segments);
    let blocks = SEQUENCES * PROMPT / BLOCK_TOKENS;
    let capacity = Capacity {
        tokens: batch.tokens.len(),
        segments: batch.segments.len(),
        outputs: batch.outputs.len(),
        blocks,
        checkpoints: 0,
    };
    let limits = Limits {
        step: capacity,
        slots: SEQUENCES,
        blocks,
        block_tokens: BLOCK_TOKENS,
        cache: Dtype::Bf16,
    };
    let backend: Box<dyn Backend> = Box::new(CudaBackend::over(Arc::clone(&ledger) as _));
    let mut model = Model::random(&config, 1, backend, limits, &mut |_| {}).unwrap();
    let step_options = StepOptions {
        candidates: 1,
        keep_rows: false,
        probe_hidden: false,
        draws: DrawCapacity::of(&batch.draws),
    };
    let mut step = model.step(capacity, step_options).unwrap();
    step.submit(&batch).unwrap().wait().unwrap();
    let mut counts = BTreeMap::new();
    for name in ledger.last.lock().unwrap().iter() {
        *counts.entry(name.clone()).or_default() += 1;
    }
    counts
}

fn table(columns: &[(&str, BTreeMap<String, usize>)]) -> String {
    let titles: Vec<&str> = columns.iter().map(|(title, _)| *title).collect();
    let mut text = format!("| launched | {} |\n|---|", titles.join(" | "));
    text.push_str(&"---:|".repeat(columns.len()));
    text.push('\n');
    let totals: Vec<String> = columns
        .iter()
        .map(|(_, counts)| format!("**{}**", counts.values().sum::<usize>()))
        .collect();
    writeln!(text, "| **all** | {} |", totals.join(" | ")).unwrap();
    let mut names: Vec<&String> = columns
        .iter()
        .flat_map(|(_, counts)| counts.keys())
        .collect();
    names.sort();
    names.dedup();
    for name in names {
        let counts = columns.iter().map(|(_, counts)| counts.get(name));
        let cells: Vec<String> = counts
            .map(|count| count.map_or_else(String::new, ToString::to_string))
            .collect();
        writeln!(text, "| {name} | {} |", cells.join(" | ")).unwrap();
    }
    text
}

#[test]
fn the_launches_of_a_step_are_those_of_the_document() {
    let decode = |sequences| {
        counted(
            (0..sequences)
                .map(|sequence| segment(sequence, CONTEXT - 1, 1))
                .collect(),
        )
    };
    let columns = [
        ("decode, 1 sequence", decode(1)),
        ("decode, 64 sequences", decode(SEQUENCES)),
        ("prefill, T=8192", counted(vec![segment(0, 0, PROMPT)])),
    ];
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/performance/hopper.md");
    let text = std::fs::read_to_string(&path).unwrap();
    let [open, close] = ["<!-- launches -->\n", "<!-- end of launches -->"];
    let (before, rest) = text
        .split_once(open)
        .expect("a mark where the launches begin");
    let (_, after) = rest
        .split_once(close)
        .expect("a mark where the launches end");
    let generated = format!("{before}{open}{}{close}{after}", table(&columns));
    if std::env::var_os("KIMI_BLESS").is_some() {
        std::fs::write(&path, &generated).unwrap();
    } else {
        assert!(
            text == generated,
            "the launches in docs/performance/hopper.md are out of date: run this test with KIMI_BLESS=1\n{}",
            table(&columns)
        );
    }
}
