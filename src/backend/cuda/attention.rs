//! How latent attention is recorded: the cache's way in, prefill, decode.

use super::step::{CudaStep, Kernel, arguments};
use crate::backend::{MlaAppend, MlaAttention, Result};
use crate::error::BackendError;

impl CudaStep {
    pub(super) fn record_mla_append(&mut self, op: MlaAppend) -> Result<()> {
        op.check(&self.capacity)?;
        self.demands.latents = Some(op.pool.layout);
        self.name("mla_append");
        let layout = op.pool.layout;
        let input = self.tensor(op.input)?;
        let [weight, format] = self.stored(op.weight)?;
        let latents = self.shared.memory().latents(&op.pool, op.layer)?.clone();
        let [latent, rope, tokens] =
            [layout.latent, layout.rope, layout.block_tokens].map(|word| word as u32);
        let kernel = Kernel::new(
            "mla_append",
            128,
            arguments![
                &self.batch,
                &input,
                weight,
                format,
                &latents,
                latent,
                rope,
                tokens,
                op.eps
            ],
        );
        self.launch(kernel, |image| [image.tokens as u32, 1, 1]);
        Ok(())
    }

    pub(super) fn record_prefill(&mut self, op: MlaAttention) -> Result<()> {
        self.missing(op, "mla_prefill")
    }

    pub(super) fn record_decode(&mut self, op: MlaAttention) -> Result<()> {
        self.missing(op, "mla_decode")
    }

    fn missing(&mut self, op: MlaAttention, name: &'static str) -> Result<()> {
        op.check(&self.capacity)?;
        self.demands.latents = Some(op.pool.layout);
        self.name(name);
        Err(BackendError::Unsupported {
            backend: "cuda",
            what: name.to_owned(),
        })
    }
}
