//! wgpu
pub mod shaders;
