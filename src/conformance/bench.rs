//! Times operations: seconds, bytes, FLOPs, and the fraction of the device's own copy and product rates that they reach.
//!
//! The cases are those of the list at the published model's sizes. The two rates are measured through the backend in the same
//! run, so a fraction compares an operation with what this device reaches in simple operations.

use std::time::Instant;

use super::context::Clock;
use super::floors::Rates;
use super::list::timed;
use super::{Case, CaseContext, Random, Tolerance};
use crate::backend::{Add, Backend, Device, Element, Linear, Op, Result, Rows, TensorValues};
use crate::checkpoint::Format;
use crate::conformance::context::plain;

/// Rounds, of which the median is used.
const ROUNDS: usize = 5;

/// Exchanges of a row that are timed.
const EXCHANGES: usize = 32;

/// One operation's timing.
#[derive(Clone, Debug, serde::Serialize)]
pub struct BenchRow {
    /// The case's name.
    pub name: String,
    /// The operation.
    pub operation: &'static str,
    /// The median time of one submission.
    pub seconds: f64,
    /// Bytes that it moves at least.
    pub bytes: u64,
    /// Floating-point operations.
    pub flops: u64,
    /// Bytes per second, divided by the measured copy rate.
    pub of_copy: f64,
    /// FLOPs per second, divided by the measured product rate.
    pub of_product: f64,
}

/// Every timing of one device.
#[derive(Clone, Debug, serde::Serialize)]
pub struct BenchReport {
    /// The device.
    pub device: Device,
    /// Bytes per second that a large sum of two tensors reads and writes.
    pub copy_bytes_per_second: f64,
    /// FLOPs per second of a large matrix product.
    pub product_flops_per_second: f64,
    /// The operations.
    pub rows: Vec<BenchRow>,
}

/// Times every operation whose case's name contains `filter`.
///
/// # Errors
/// A backend that fails or cannot hold a case.
pub fn bench_ops(
    make: &mut dyn FnMut() -> Result<Box<dyn Backend>>,
    filter: Option<&str>,
    on_row: &mut dyn FnMut(&BenchRow),
) -> Result<BenchReport> {
    let mut backend = make()?;
    let device = backend.device().clone();
    let Rates {
        bytes_per_second: copy_rate,
        flops_per_second: product_rate,
        ..
    } = measured_rates(&mut *backend)?;
    let mut report = BenchReport {
        device,
        copy_bytes_per_second: copy_rate,
        product_flops_per_second: product_rate,
        rows: Vec::new(),
    };
    let wanted = |case: &Case| filter.is_none_or(|filter| case.name.contains(filter));
    for case in timed().iter().filter(|case| wanted(case)) {
        // One backend per case: handles are never freed, and these cases are large.
        drop(backend);
        backend = make()?;
        let seconds = time(case, &mut *backend)?;
        let row = BenchRow {
            name: case.name.clone(),
            operation: case.operation,
            seconds,
            bytes: case.work.bytes,
            flops: case.work.flops,
            of_copy: rate(case.work.bytes, seconds) / copy_rate,
            of_product: rate(case.work.flops, seconds) / product_rate,
        };
        on_row(&row);
        report.rows.push(row);
    }
    Ok(report)
}

fn rate(work: u64, seconds: f64) -> f64 {
    work as f64 / seconds.max(1e-12)
}

/// Bytes per second that a large sum of two tensors reads and writes, measured in this run.
///
/// # Errors
/// A backend that fails.
pub fn copy_rate(backend: &mut dyn Backend) -> Result<f64> {
    let large = backend.device().backend == "cuda";
    let copy = copy_case(large);
    Ok(rate(copy.work.bytes, time(&copy, backend)?))
}

/// Seconds in which a row of `width` activations is read from a device and one is written to it: the median of several.
///
/// # Errors
/// A backend that fails.
pub fn exchange_seconds(backend: &mut dyn Backend, width: usize) -> Result<f64> {
    let row = backend.tensor(Rows::Tokens, 1, width, Element::Activation)?;
    let mut values = TensorValues::F32(vec![0.0; width]);
    backend.write_tensor(row, &values)?;
    let mut times = Vec::with_capacity(EXCHANGES);
    for _ in 0..EXCHANGES {
        let start = Instant::now();
        values = backend.read_tensor(row, 1).wait()?;
        backend.write_tensor(row, &values)?;
        times.push(start.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    Ok(times[EXCHANGES / 2])
}

/// A device's rates for copies and products, measured in this run.
///
/// # Errors
/// A backend that fails.
pub fn measured_rates(backend: &mut dyn Backend) -> Result<Rates> {
    let product = product_case(backend.device().backend == "cuda");
    Ok(Rates {
        source: "a large sum and a large product, measured in the same run".to_owned(),
        bytes_per_second: copy_rate(backend)?,
        flops_per_second: rate(product.work.flops, time(&product, backend)?),
    })
}

/// The median seconds of one submission of a case.
fn time(case: &Case, backend: &mut dyn Backend) -> Result<f64> {
    let clock = Clock {
        rounds: ROUNDS,
        median: None,
    };
    let random = Random::new(&case.name);
    let mut ctx = CaseContext::new(backend, random, case.tolerance, 1, Some(clock));
    (case.body)(&mut ctx)?;
    let (_, clock) = ctx.finish();
    let median = clock.and_then(|clock| clock.median);
    Ok(median.map_or(f64::NAN, |median| median.as_secs_f64()))
}

/// Two reads and a write of each element, with almost no arithmetic: the device's copy rate. NVIDIA GPUs have caches of tens
/// of megabytes, so that their tensors are `large`: 256 MiB each.
fn copy_case(large: bool) -> Case {
    let (rows, width) = (if large { 16_384 } else { 1024 }, 8192);
    let case = Case::new("add", "copy rate", Tolerance::Rounded, move |ctx| {
        let zeros = vec![0.0; rows * width];
        let source = ctx.input(width, Element::Activation, &zeros)?;
        let target = ctx.input(width, Element::Activation, &zeros)?;
        let mut step = ctx.compile(&plain(rows), [Op::from(Add { source, target })])?;
        ctx.submit(&mut *step, &plain(rows)).map(drop)
    });
    let element = if large { 2 } else { 4 };
    case.with_work(3 * element * rows * width, rows * width)
}

/// A product that is large enough to be limited by arithmetic; a `large` one fills an NVIDIA GPU.
fn product_case(large: bool) -> Case {
    let (rows, width) = if large { (8192, 8192) } else { (512, 2048) };
    let case = Case::new("linear", "product rate", Tolerance::Close, move |ctx| {
        let values = vec![0.5; width * width];
        let matrix = ctx.matrix(Format::BF16, [1, width, width], values)?;
        let input = ctx.input(width, Element::Activation, &vec![0.5; rows * width])?;
        let output = ctx.output(rows, width)?;
        let product = Linear {
            input,
            weight: matrix.weight,
            output,
        };
        let mut step = ctx.compile(&plain(rows), [Op::from(product)])?;
        ctx.submit(&mut *step, &plain(rows)).map(drop)
    });
    case.with_work(
        2 * width * width + 8 * rows * width,
        2 * rows * width * width,
    )
}
