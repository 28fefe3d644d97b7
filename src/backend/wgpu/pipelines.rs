//! Pipelines: compiled once for each shader, entry point and set of overrides, and cached.

use std::collections::HashMap;

use super::device::Gpu;
use super::shaders;
use crate::backend::Result;
use crate::error::BackendError;

/// A buffer and its binding number in a shader. Binding 0 has the parameters, which are passed separately.
#[derive(Clone, Copy)]
pub(super) enum Bind<'a> {
    /// Only read.
    Read(u32, &'a wgpu::Buffer),
    /// Read and written.
    Write(u32, &'a wgpu::Buffer),
}

impl<'a> Bind<'a> {
    fn number(self) -> u32 {
        match self {
            Self::Read(number, _) | Self::Write(number, _) => number,
        }
    }

    fn buffer(self) -> &'a wgpu::Buffer {
        match self {
            Self::Read(_, buffer) | Self::Write(_, buffer) => buffer,
        }
    }

    fn read_only(self) -> bool {
        matches!(self, Self::Read(..))
    }
}

/// The shader, entry point and overrides of a pipeline.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Program {
    /// The shader's file.
    pub(super) shader: &'static str,
    /// The entry point in that file.
    pub(super) entry: &'static str,
    /// The overrides that differ from their defaults.
    constants: Vec<(&'static str, u32)>,
}

impl Program {
    /// The only entry point of a shader, which has the shader's name.
    pub(super) fn new(shader: &'static str) -> Self {
        Self::entry(shader, shader)
    }

    /// One of several entry points.
    pub(super) fn entry(shader: &'static str, entry: &'static str) -> Self {
        Self {
            shader,
            entry,
            constants: Vec::new(),
        }
    }

    /// The same with an override set.
    pub(super) fn with(mut self, constant: &'static str, value: u32) -> Self {
        self.constants.push((constant, value));
        self
    }
}

/// A pipeline and the layout of its bind groups.
#[derive(Clone)]
pub(super) struct Pipeline {
    pub(super) pipeline: wgpu::ComputePipeline,
    layout: wgpu::BindGroupLayout,
}

/// The pipelines compiled so far.
#[derive(Default)]
pub(super) struct Pipelines(HashMap<(Program, Vec<(u32, bool)>), Pipeline>);

impl Pipelines {
    /// The pipeline of `program` for buffers bound like `binds`.
    pub(super) fn get(
        &mut self,
        gpu: &Gpu,
        program: Program,
        binds: &[Bind<'_>],
    ) -> Result<Pipeline> {
        let form = binds
            .iter()
            .map(|bind| (bind.number(), bind.read_only()))
            .collect();
        let key = (program, form);
        if let Some(pipeline) = self.0.get(&key) {
            return Ok(pipeline.clone());
        }
        let pipeline = compile(gpu, &key.0, &key.1)?;
        self.0.insert(key, pipeline.clone());
        Ok(pipeline)
    }
}

fn compile(gpu: &Gpu, program: &Program, form: &[(u32, bool)]) -> Result<Pipeline> {
    let Program {
        shader,
        entry,
        constants,
    } = program;
    let source =
        shaders::source(shader, gpu.subgroups).ok_or_else(|| BackendError::Unsupported {
            backend: "wgpu",
            what: format!("the shader {shader}"),
        })?;
    let constants: Vec<_> = constants
        .iter()
        .map(|(name, value)| (*name, f64::from(*value)))
        .collect();
    let what = format!("the shader {shader}, entry point {entry}");
    gpu.guarded(&what, 0, || {
        let device = &gpu.device;
        let module = device.create_shader_module(wgpu::ShaderModuleDescriptor {
            label: Some(shader),
            source: wgpu::ShaderSource::Wgsl(source.into()),
        });
        let entries: Vec<_> = std::iter::once((0, wgpu::BufferBindingType::Uniform))
            .chain(form.iter().map(|(number, read_only)| {
                let read_only = *read_only;
                (*number, wgpu::BufferBindingType::Storage { read_only })
            }))
            .map(|(binding, ty)| wgpu::BindGroupLayoutEntry {
                binding,
                visibility: wgpu::ShaderStages::COMPUTE,
                ty: wgpu::BindingType::Buffer {
                    ty,
                    has_dynamic_offset: false,
                    min_binding_size: None,
                },
                count: None,
            })
            .collect();
        let layout = device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor {
            label: Some(entry),
            entries: &entries,
        });
        let pipeline_layout = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label: Some(entry),
            bind_group_layouts: &[Some(&layout)],
            immediate_size: 0,
        });
        let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some(entry),
            layout: Some(&pipeline_layout),
            module: &module,
            entry_point: Some(entry),
            // No shader reads workgroup memory that it has not written.
            compilation_options: wgpu::PipelineCompilationOptions {
                constants: &constants,
                zero_initialize_workgroup_memory: false,
            },
            cache: None,
        });
        Pipeline { pipeline, layout }
    })
}

/// Compiles a shader without bindings, and drops it.
pub(super) fn compiles(gpu: &Gpu, wgsl: &str) -> Result<()> {
    gpu.guarded("a shader", 0, || {
        let module = gpu
            .device
            .create_shader_module(wgpu::ShaderModuleDescriptor {
                label: None,
                source: wgpu::ShaderSource::Wgsl(wgsl.into()),
            });
        let _pipeline = gpu
            .device
            .create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
                label: None,
                layout: None,
                module: &module,
                entry_point: Some("main"),
                compilation_options: wgpu::PipelineCompilationOptions::default(),
                cache: None,
            });
    })
}

/// Binds `params` and `binds` for a pipeline.
pub(super) fn bind_group(
    gpu: &Gpu,
    pipeline: &Pipeline,
    what: &str,
    params: wgpu::BufferBinding<'_>,
    binds: &[Bind<'_>],
) -> Result<wgpu::BindGroup> {
    let entries: Vec<_> = std::iter::once(wgpu::BindGroupEntry {
        binding: 0,
        resource: wgpu::BindingResource::Buffer(params),
    })
    .chain(binds.iter().map(|bind| wgpu::BindGroupEntry {
        binding: bind.number(),
        resource: bind.buffer().as_entire_binding(),
    }))
    .collect();
    gpu.guarded(what, 0, || {
        gpu.device.create_bind_group(&wgpu::BindGroupDescriptor {
            label: Some(what),
            layout: &pipeline.layout,
            entries: &entries,
        })
    })
}

/// The parameters of all of a step's dispatches, in a few buffers that are written while the step is encoded.
#[derive(Default)]
pub(super) struct Parameters {
    pages: Vec<wgpu::Buffer>,
    used: u64,
}

/// Maximum bytes of one dispatch's parameters.
const BYTES: usize = 64;
/// Bytes per page.
const PAGE: u64 = 64 << 10;

impl Parameters {
    /// Stores parameters for the step's lifetime; returns the page and the offset.
    pub(super) fn keep(&mut self, gpu: &Gpu, params: &[u8]) -> Result<(wgpu::Buffer, u64)> {
        let size = (BYTES as u64).next_multiple_of(gpu.uniform_alignment);
        if self.pages.is_empty() || self.used + size > PAGE {
            let usage = wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST;
            self.pages
                .push(gpu.buffer_for("parameters of a step", PAGE, usage)?);
            self.used = 0;
        }
        let page = self.pages[self.pages.len() - 1].clone();
        let mut padded = [0; BYTES];
        padded[..params.len()].copy_from_slice(params);
        gpu.queue.write_buffer(&page, self.used, &padded);
        let offset = self.used;
        self.used += size;
        Ok((page, offset))
    }
}

/// The binding of one dispatch's parameters.
pub(super) fn parameter_binding(page: &wgpu::Buffer, offset: u64) -> wgpu::BufferBinding<'_> {
    wgpu::BufferBinding {
        buffer: page,
        offset,
        size: wgpu::BufferSize::new(BYTES as u64),
    }
}
