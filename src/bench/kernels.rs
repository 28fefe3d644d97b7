//! Single kernels at a shape's sizes: time, floor, and the error of a sample of the results against f64 code.
//!
//! A kernel is compiled over several sets of weights or caches if a single set would stay in the device's cache. There are two
//! clocks: submissions without waiting in between (graphs, if the backend has them), and the device's own timestamps around each
//! operation. Both include the whole kernel, so the shorter one is its time.

use super::kda::{self, Numbers, Planned};
use super::kernel_report::sets;
pub use super::kernel_report::{Options, Report, Row, Time};
use super::oracle::{self, Attention};
use super::{Make, layer, operations, queued, segment, table};
use crate::backend::{
    Backend, Batch, Capacity, Element, Experts, LatentLayout, Linear, MlaAttention, Op, Place,
    Program, Random, RandomWeight, Result, Rows, Segments, Step, Tensor, TensorValues, Weight,
};
use crate::checkpoint::Format;
use crate::config::ModelConfig;
use crate::conformance::bench::measured_rates;
use crate::conformance::floors::{self, Kernel, Phase, Rates};
use crate::conformance::{self, Gates, norm_error};
use crate::error::{BackendError, Error};

/// Tokens of a block.
const BLOCK_TOKENS: usize = 64;

/// A kernel that is ready to run.
struct Ready {
    step: Box<dyn Step>,
    batch: Batch,
    /// How many times the kernel is in the step.
    sets: usize,
    /// Computes the error of the last run.
    check: Check,
}

impl Ready {
    fn new(
        step: Box<dyn Step>,
        batch: Batch,
        sets: usize,
        check: impl FnOnce(&mut dyn Backend) -> Result<f64> + 'static,
    ) -> Self {
        let check = Box::new(check);
        Self {
            step,
            batch,
            sets,
            check,
        }
    }
}

type Check = Box<dyn FnOnce(&mut dyn Backend) -> Result<f64>>;

/// Runs every kernel of the table.
///
/// # Errors
/// A backend that cannot be opened or fails. A kernel that it does not support is noted in its row.
pub fn run(
    make: Make<'_>,
    options: &Options,
    on_row: &mut dyn FnMut(&Row),
) -> std::result::Result<Report, Error> {
    let mut backend = make()?;
    let device = backend.device().clone();
    // An unknown device is compared with its own measured rates of copies and products.
    let rates = match Rates::of(&device.name) {
        None if options.effort.is_some() => Some(measured_rates(&mut *backend)?),
        known => known,
    };
    let mut report = Report {
        rates,
        device,
        rows: Vec::new(),
    };
    let wanted = |name: &str| {
        let filter = options.filter.as_deref();
        filter.is_none_or(|filter| name.contains(filter))
    };
    let mut first = options.effort.is_none();
    for kernel in floors::kernels(&options.config, &options.sizes) {
        for (name, gates) in forms(&kernel) {
            if !wanted(&name) {
                continue;
            }
            if !first {
                drop(backend);
                backend = make()?;
            }
            first = false;
            let row = one(&mut *backend, options, &kernel, name, gates, &report)?;
            on_row(&row);
            report.rows.push(row);
        }
        if let (Some(name), Some(effort)) = (layer::name(&kernel), options.effort)
            && wanted(&name)
        {
            drop(backend);
            let row = layer::run(make()?, options, &kernel, name, effort, &report)?;
            on_row(&row);
            report.rows.push(row);
            backend = make()?;
        }
    }
    Ok(report)
}

/// A kernel's names: the recurrence's speed may depend on its gates, so it is measured with those of a freshly initialised model
/// and with slow ones, which remember thousands of tokens.
fn forms(kernel: &Kernel) -> Vec<(String, Gates)> {
    let name = kernel.name();
    match kernel {
        Kernel::KdaPrefill { .. } => [("fresh", Gates::Init), ("slow", Gates::Frozen)]
            .map(|(kind, gates)| (format!("{name}, {kind} gates"), gates))
            .to_vec(),
        _ => vec![(name, Gates::Init)],
    }
}

fn one(
    backend: &mut dyn Backend,
    options: &Options,
    kernel: &Kernel,
    name: String,
    gates: Gates,
    report: &Report,
) -> Result<Row> {
    let config = &options.config;
    let work = kernel.work(config);
    let floor = report.rates.as_ref().map(|rates| work.floor(rates));
    let mut row = Row {
        name,
        operation: kernel.operation(),
        bytes: work.bytes,
        flops: work.flops,
        floor_seconds: floor.map(|(seconds, _)| seconds),
        bound: floor.map(|(_, bound)| bound),
        time: None,
        error: None,
        refused: None,
    };
    let ready = match *kernel {
        Kernel::KdaPrefill { tokens, sequences } => {
            let lengths = vec![tokens / sequences; sequences];
            recurrence(backend, config, &lengths, gates, false, 1)
        }
        Kernel::KdaDecode { sequences } => {
            let sets = sets(work.bytes);
            recurrence(backend, config, &vec![1; sequences], gates, true, sets)
        }
        Kernel::MlaDecode { context, sequences } => {
            attention(backend, config, context, 1, sequences, sets(work.bytes))
        }
        Kernel::MlaPrefill { tokens } => attention(backend, config, tokens, tokens, 1, 1),
        Kernel::Experts { phase, tokens } => {
            experts(backend, config, phase, tokens, sets(work.bytes))
        }
        Kernel::Product {
            phase,
            rows,
            inputs,
            outputs,
            ..
        } => product(backend, phase, [rows, inputs, outputs], sets(work.bytes)),
        Kernel::Step { .. } => return Ok(row),
    };
    let mut ready = match ready {
        Ok(ready) => ready,
        Err(
            error @ (BackendError::Unsupported { .. }
            | BackendError::OutOfMemory { .. }
            | BackendError::TooLarge { .. }),
        ) => {
            row.refused = Some(error.to_string());
            return Ok(row);
        }
        Err(error) => return Err(error),
    };
    ready.step.submit(&ready.batch)?.wait()?;
    row.error = Some((ready.check)(backend)?);
    if let Some(effort) = options.effort {
        let count = ready.sets as f64;
        let seconds = queued(&mut *ready.step, &ready.batch, effort)? / count;
        let mut time = Time {
            seconds,
            clock: "queued",
        };
        let all = operations(&mut *ready.step, &ready.batch, effort)?;
        let seconds = all.iter().map(|(_, ms)| ms).sum::<f64>() / 1000.0 / count;
        if seconds > 0.0 && seconds < time.seconds {
            time = Time {
                seconds,
                clock: "timestamps",
            };
        }
        row.time = Some(time);
    }
    Ok(row)
}

fn recurrence(
    backend: &mut dyn Backend,
    config: &ModelConfig,
    lengths: &[usize],
    gates: Gates,
    seeded: bool,
    sets: usize,
) -> Result<Ready> {
    let shape = [config.kda_num_heads, config.kda_head_dim];
    let numbers = Numbers::random(shape, lengths, gates, seeded);
    let planned = Planned::new(backend, &numbers, sets)?;
    let batch = planned.batch.clone();
    let Planned {
        step, operation, ..
    } = planned;
    let ran = batch.clone();
    let check = move |backend: &mut dyn Backend| {
        let (output, states) = kda::answers(backend, &operation, &ran)?;
        let errors = numbers.errors(&numbers.answers(), &output, &states);
        Ok(errors.output.max(errors.state))
    };
    Ok(Ready::new(step, batch, sets, check))
}

/// A weight that the device generates, and its numbers.
fn made(
    backend: &mut dyn Backend,
    name: &str,
    [stack, rows, columns]: [usize; 3],
) -> Result<(Weight, Random)> {
    // As in `Model::random`: sums are about as large as their terms.
    let exponent = (3.0 / columns as f32).sqrt().log2().floor() as i32;
    let random = Random::named(name, 0, exponent);
    let weight = backend.random_weight(RandomWeight {
        name: name.to_owned(),
        format: Format::BF16,
        stack,
        rows,
        columns,
        place: Place::default(),
        random,
    })?;
    Ok((weight, random))
}

/// Numbers in (-2, 2), exact in bf16.
fn numbers(name: &str, count: usize) -> Vec<f32> {
    let random = Random::named(name, 0, 1);
    let value = |i| half::bf16::from_f32(random.value(i)).to_f32();
    (0..count as u64).map(value).collect()
}

fn tensor(
    backend: &mut dyn Backend,
    rows: usize,
    width: usize,
    element: Element,
    values: TensorValues,
) -> Result<Tensor> {
    let tensor = backend.tensor(Rows::Tokens, rows, width, element)?;
    backend.write_tensor(tensor, &values)?;
    Ok(tensor)
}

/// An output tensor, filled with NaN.
fn blank(backend: &mut dyn Backend, rows: usize, width: usize, element: Element) -> Result<Tensor> {
    let poison = TensorValues::F32(vec![f32::NAN; rows * width]);
    tensor(backend, rows, width, element, poison)
}

/// The rows that are compared: the first and the last.
fn ends(rows: usize) -> Vec<usize> {
    if rows > 1 { vec![0, rows - 1] } else { vec![0] }
}

fn read(backend: &mut dyn Backend, tensor: Tensor) -> Result<Vec<f32>> {
    let values = backend.read_tensor(tensor, tensor.capacity).wait()?;
    Ok(values.as_f32().unwrap_or(&[]).to_vec())
}

/// A batch of `rows` rows, for operations that depend only on their number: one segment per row, or one segment.
fn plain(phase: Phase, rows: usize) -> (Batch, Capacity) {
    let segments = match phase {
        Phase::Decode => (0..rows)
            .map(|i| segment(i, 0, 1, false, Vec::new()))
            .collect(),
        Phase::Prefill => vec![segment(0, 0, rows, false, Vec::new())],
    };
    let capacity = Capacity {
        tokens: rows,
        segments: segments.len(),
        outputs: 0,
        blocks: 0,
        checkpoints: 0,
    };
    let batch = Batch {
        tokens: vec![0; rows],
        segments,
        outputs: Vec::new(),
        draws: Vec::new(),
        fed: Vec::new(),
    };
    (batch, capacity)
}

fn product(
    backend: &mut dyn Backend,
    phase: Phase,
    [rows, inputs, outputs]: [usize; 3],
    sets: usize,
) -> Result<Ready> {
    let weights: Vec<(Weight, Random)> = (0..sets)
        .map(|i| made(backend, &format!("product {i}"), [1, outputs, inputs]))
        .collect::<Result<_>>()?;
    let values = numbers("rows", rows * inputs);
    let from = TensorValues::F32(values.clone());
    let input = tensor(backend, rows, inputs, Element::Activation, from)?;
    let output = blank(backend, rows, outputs, Element::Activation)?;
    let (batch, capacity) = plain(phase, rows);
    let program: Program = weights
        .iter()
        .map(|(weight, _)| Linear {
            input,
            weight: *weight,
            output,
        })
        .collect();
    let step = backend.compile(&program, capacity)?;
    let random = weights[sets - 1].1;
    let check = move |backend: &mut dyn Backend| {
        let all = read(backend, output)?;
        let (mut found, mut expected) = (Vec::new(), Vec::new());
        for row in ends(rows) {
            // An odd stride visits every place of a tile.
            for column in (0..outputs).step_by((outputs / 128) | 1) {
                let input = &values[row * inputs..(row + 1) * inputs];
                found.push(all[row * outputs + column]);
                expected.push(oracle::product(&random, inputs, column, input));
            }
        }
        Ok(norm_error(&found, &expected))
    };
    Ok(Ready::new(step, batch, sets, check))
}

fn experts(
    backend: &mut dyn Backend,
    config: &ModelConfig,
    phase: Phase,
    tokens: usize,
    sets: usize,
) -> Result<Ready> {
    let (count, n, d) = (
        config.num_experts,
        config.moe_intermediate_size,
        config.hidden_size,
    );
    let top = config.num_experts_per_token;
    let (gate, gates) = made(backend, "gate", [count, n, d])?;
    let (up, ups) = made(backend, "up", [count, n, d])?;
    let (down, downs) = made(backend, "down", [count, d, n])?;
    let values = numbers("rows", tokens * d);
    let from = TensorValues::F32(values.clone());
    let input = tensor(backend, tokens, d, Element::Activation, from)?;
    let output = blank(backend, tokens, d, Element::Activation)?;
    // Uniform choices, different in each set.
    let mut random = conformance::Random::new("experts");
    let (mut choices, mut last) = (Vec::new(), (Vec::new(), Vec::new()));
    for _ in 0..sets {
        let mut ids = Vec::with_capacity(tokens * top);
        for _ in 0..tokens {
            let mut left: Vec<u32> = (0..count as u32).collect();
            ids.extend((0..top).map(|_| left.swap_remove(random.below(left.len()))));
        }
        let weights: Vec<f32> = (0..tokens * top).map(|_| random.uniform()).collect();
        let chosen = TensorValues::Index(ids.clone());
        let chosen = tensor(backend, tokens, top, Element::Index, chosen)?;
        let shares = TensorValues::F32(weights.clone());
        choices.push((chosen, tensor(backend, tokens, top, Element::F32, shares)?));
        last = (ids, weights);
    }
    let (batch, capacity) = plain(phase, tokens);
    let program: Program = choices
        .iter()
        .map(|(experts, weights)| Experts {
            input,
            experts: *experts,
            weights: *weights,
            gate,
            up,
            down,
            first_expert: 0,
            output,
        })
        .collect();
    let step = backend.compile(&program, capacity)?;
    let check = move |backend: &mut dyn Backend| {
        let all = read(backend, output)?;
        let (mut found, mut expected) = (Vec::new(), Vec::new());
        let (ids, weights) = last;
        for row in ends(tokens) {
            found.extend_from_slice(&all[row * d..(row + 1) * d]);
            expected.extend(oracle::experts(
                [&gates, &ups, &downs],
                [n, d],
                &ids[row * top..(row + 1) * top],
                &weights[row * top..(row + 1) * top],
                &values[row * d..(row + 1) * d],
            ));
        }
        Ok(norm_error(&found, &expected))
    };
    Ok(Ready::new(step, batch, sets, check))
}

/// Attention of the last `length` tokens of each of `sequences` contexts: the absorbed form for single tokens, else the expanded form.
fn attention(
    backend: &mut dyn Backend,
    config: &ModelConfig,
    context: usize,
    length: usize,
    sequences: usize,
    sets: usize,
) -> Result<Ready> {
    let (nope, value) = (config.qk_nope_head_dim, config.v_head_dim);
    let (heads, key) = (config.num_attention_heads, config.mla_query_dim());
    let each = context.div_ceil(BLOCK_TOKENS);
    let pool = backend.latent_pool(LatentLayout {
        layers: sets,
        latent: config.kv_lora_rank,
        rope: config.qk_rope_head_dim,
        block_tokens: BLOCK_TOKENS,
        blocks: sequences * each,
        dtype: backend.device().cache,
    })?;
    let latents = Random::named("latents", 0, 0);
    backend.fill_latents(&pool, latents)?;
    let expansion = [1, heads * (nope + value), config.kv_lora_rank];
    let (kv_b, expansion) = made(backend, "kv_b", expansion)?;
    let rows = sequences * length;
    let values = numbers("queries", rows * heads * key);
    let from = TensorValues::F32(values.clone());
    let query = tensor(backend, rows, heads * key, Element::Activation, from)?;
    let output = blank(backend, rows, heads * value, Element::Activation)?;
    let batch = Batch {
        tokens: vec![0; rows],
        segments: (0..sequences)
            .map(|i| {
                segment(
                    i,
                    context - length,
                    length,
                    false,
                    table(i, context, BLOCK_TOKENS),
                )
            })
            .collect(),
        outputs: Vec::new(),
        draws: Vec::new(),
        fed: Vec::new(),
    };
    let capacity = Capacity {
        tokens: rows,
        segments: sequences,
        outputs: 0,
        blocks: sequences * each,
        checkpoints: 0,
    };
    let attention = |layer| {
        let op = MlaAttention {
            query,
            kv_b,
            nope,
            value,
            pool,
            layer,
            segments: Segments::All,
            output,
        };
        if length == 1 {
            Op::MlaDecode(op)
        } else {
            Op::MlaPrefill(op)
        }
    };
    let program: Program = (0..sets).map(attention).collect();
    let step = backend.compile(&program, capacity)?;
    let config = config.clone();
    let check = move |backend: &mut dyn Backend| {
        let all = read(backend, output)?;
        let attention = Attention {
            config: &config,
            pool,
            layer: sets - 1,
            latents,
            kv_b: expansion,
        };
        let sizes = [rows, length, context - length];
        Ok(attention_error(&attention, &values, &all, sizes))
    };
    Ok(Ready::new(step, batch, sets, check))
}

/// The error of sampled rows and heads of `found` `[rows, heads * value]` against attention of `queries` `[rows, heads * key]`.
/// Each sequence has `length` rows after `cached` tokens.
fn attention_error(
    attention: &Attention<'_>,
    queries: &[f32],
    found: &[f32],
    [rows, length, cached]: [usize; 3],
) -> f64 {
    let config = attention.config;
    let (heads, key, value) = (
        config.num_attention_heads,
        config.mla_query_dim(),
        config.v_head_dim,
    );
    let each = (cached + length).div_ceil(BLOCK_TOKENS);
    let (mut sample, mut expected) = (Vec::new(), Vec::new());
    for row in ends(rows) {
        let (sequence, place) = (row / length, row % length);
        for head in ends(heads) {
            let start = (row * heads + head) * key;
            let query = &queries[start..start + key];
            expected.extend(attention.head(head, query, sequence * each, cached + place + 1));
            let start = (row * heads + head) * value;
            sample.extend_from_slice(&found[start..start + value]);
        }
    }
    norm_error(&sample, &expected)
}
