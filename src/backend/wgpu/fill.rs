//! Generates random numbers in the device's buffers.

use std::sync::PoisonError;

use super::Shared;
use super::memory::number;
use super::params::params;
use super::pipelines::{self, Bind, Parameters, Program};
use super::step::flat;
use crate::backend::{Random, Result};
use crate::config::Dtype;

params! {
    Fill of "fill" {
        first: u32, words: u32, element: u32, columns: u32, stride: u32, format: u32, packed: u32, seed: u32,
        mean: f32, scale: f32,
    }
}

/// Words per dispatch: its grid stays within every device's limits.
const WORDS: usize = 1 << 26;

/// The layout of the numbers in a buffer.
pub(super) struct Rows {
    /// The index of its first element.
    pub(super) element: usize,
    /// Number of rows.
    pub(super) rows: usize,
    /// Elements per row.
    pub(super) columns: usize,
    /// Elements from one row to the next; padding becomes zero.
    pub(super) stride: usize,
    /// The dtype that numbers are rounded to.
    pub(super) dtype: Dtype,
    /// Whether two numbers of 16 bits share a word; otherwise they are widened to f32.
    pub(super) packed: bool,
}

impl Rows {
    /// f32 without padding.
    pub(super) fn plain(elements: usize) -> Self {
        Self {
            element: 0,
            rows: 1,
            columns: elements,
            stride: elements,
            dtype: Dtype::F32,
            packed: false,
        }
    }
}

/// Fills a buffer.
pub(super) fn fill(
    shared: &Shared,
    buffer: &wgpu::Buffer,
    rows: &Rows,
    random: Random,
) -> Result<()> {
    let gpu = &shared.gpu;
    let elements = rows.rows * rows.stride;
    let words = if rows.packed {
        elements.div_ceil(2)
    } else {
        elements
    };
    let binds = [Bind::Write(2, buffer)];
    let program = Program::new("fill");
    let pipeline = {
        let mut pipelines = shared
            .pipelines
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        pipelines.get(gpu, program, &binds)?
    };
    let mut parameters = Parameters::default();
    for first in (0..words).step_by(WORDS) {
        let end = words.min(first + WORDS);
        // Indices count modulo 2^32, and no binding is longer.
        let params = params::Fill {
            first: first as u32,
            words: end as u32,
            element: rows.element as u32,
            columns: rows.columns as u32,
            stride: rows.stride as u32,
            format: number(rows.dtype),
            packed: u32::from(rows.packed),
            seed: random.seed,
            mean: random.mean,
            scale: random.scale(),
        };
        let (page, offset) = parameters.keep(gpu, bytemuck::bytes_of(&params))?;
        let params = pipelines::parameter_binding(&page, offset);
        let group = pipelines::bind_group(gpu, &pipeline, "fill", params, &binds)?;
        gpu.guarded("random numbers", 0, || {
            let mut encoder = gpu
                .device
                .create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            {
                let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
                pass.set_pipeline(&pipeline.pipeline);
                pass.set_bind_group(0, &group, &[]);
                let [x, y, z] = flat(end - first);
                pass.dispatch_workgroups(x, y, z);
            }
            gpu.queue.submit([encoder.finish()]);
        })?;
    }
    Ok(())
}
