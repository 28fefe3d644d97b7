//! Encodes dense products: of rows of longer segments by cuBLASLt, of other rows by kernels for few rows, several products a
//! launch.

use std::sync::Arc;

use super::machine::{Buffer, Product};
use super::params::{self, PRODUCTS};
use super::step::{CudaStep, Kernel, STAGES_BYTES, TILE, kind};
use super::weights::Stored;
use crate::backend::gpu::batch_metadata::BatchMetadata;
use crate::backend::{Element, Linear, Result, Rows, Weight};

/// Rows that a warp of `linear` in `kernels/linear.cu` computes together.
pub(super) const ANY_TOGETHER: usize = 8;

/// Kernels for few rows, and the number of rows for which each reads the weight once.
const FEW: [(&str, usize); 4] = [
    ("linear_few_8", 8),
    ("linear_few_16", 16),
    ("linear_few_32", 32),
    ("linear_few_64", FEWEST_READS),
];
/// Maximum number of rows for which the weight is read once.
const FEWEST_READS: usize = 64;

/// Outputs per block of those kernels.
const FEW_OUTPUTS: usize = 32;

/// A product with a weight in bf16.
pub(super) struct Dense {
    from: Arc<Buffer>,
    weight: Arc<Buffer>,
    to: Arc<Buffer>,
    rows: Rows,
    /// Whether outputs are f32.
    full: bool,
    columns: usize,
    outputs: usize,
}

/// Whether cuBLASLt is sure to support a product with this number of columns and outputs: it guarantees only rows of whole 16
/// bytes.
pub(super) fn suits_library(columns: usize, outputs: usize) -> bool {
    columns.is_multiple_of(8) && outputs.is_multiple_of(8)
}

/// The kernel for a weight of any format and shape. Its grid has a block for 8 outputs by [`ANY_TOGETHER`] rows.
pub(super) fn any_shape(product: &params::Linear<'_>) -> Kernel {
    Kernel::new("linear", 256, product)
}

impl CudaStep {
    /// Encodes products of which none reads the output of another: `output = input weight^T`.
    pub(super) fn products(&mut self, list: &[Linear]) -> Result<()> {
        let mut few = Vec::new();
        for op in list {
            few.extend(self.product_of_several(op)?);
        }
        for alike in few.chunk_by(|a, b| a.rows == b.rows && a.full == b.full) {
            alike.chunks(PRODUCTS).for_each(|some| self.few(some));
        }
        Ok(())
    }

    /// Encodes a product's rows of longer segments, or all rows if the weight is not in bf16. Returns what is left.
    pub(super) fn product_of_several(&mut self, op: &Linear) -> Result<Option<Dense>> {
        let weight = op.weight;
        let (from, to) = (self.tensor(op.input)?, self.tensor(op.output)?);
        let full = op.output.element == Element::F32;
        let rows = op.input.rows;
        let ranges = self.shared.memory().weight(weight)?.ranges().to_vec();
        if let Some(matrix) = self.bf16(weight)? {
            let product = Product {
                input: Arc::clone(&from),
                weight: Arc::clone(&matrix),
                output: Arc::clone(&to),
                rows: 0,
                columns: weight.columns,
                outputs: weight.rows,
                full,
            };
            let even = suits_library(weight.columns, weight.rows);
            match rows {
                Rows::Tokens if even => self.library(product),
                Rows::Tokens => {
                    let wanted = |metadata: &BatchMetadata| metadata.several_rows > 0;
                    for range in ranges {
                        self.any(rows, &from, range, &to, full, weight, wanted);
                    }
                }
                Rows::Outputs => {}
            }
            return Ok(Some(Dense {
                from,
                weight: matrix,
                to,
                rows,
                full,
                columns: weight.columns,
                outputs: weight.rows,
            }));
        }
        for range in ranges {
            if range.in_blocks() {
                self.blocks(rows, &from, &range, &to, full, weight)?;
            } else {
                self.any(rows, &from, range, &to, full, weight, |_| true);
            }
        }
        Ok(None)
    }

    /// Encodes `output = input weight^T` for some rows of a weight of any format and shape, for batches that have such rows.
    fn any(
        &mut self,
        rows: Rows,
        from: &Arc<Buffer>,
        range: Stored,
        to: &Arc<Buffer>,
        full: bool,
        weight: Weight,
        wanted: fn(&BatchMetadata) -> bool,
    ) {
        let outputs = range.rows.len() as u32;
        let kernel = any_shape(&self.linear_params(rows, from, &range, to, full, weight));
        self.launch(kernel, move |metadata| {
            let together = metadata.count(rows).div_ceil(ANY_TOGETHER) as u32;
            let blocks = if wanted(metadata) {
                outputs.div_ceil(8)
            } else {
                0
            };
            [blocks, together, 1]
        });
    }

    /// The parameters of `output = input weight^T` for some rows of a weight.
    fn linear_params<'a>(
        &'a self,
        rows: Rows,
        input: &'a Arc<Buffer>,
        range: &'a Stored,
        output: &'a Arc<Buffer>,
        full: bool,
        weight: Weight,
    ) -> params::Linear<'a> {
        params::Linear {
            batch: &self.batch,
            rows: kind(rows),
            input,
            weight: &range.buffer,
            format: range.id,
            output,
            full,
            columns: weight.columns,
            outputs: range.rows.len(),
            first: range.rows.start,
            width: weight.rows,
        }
    }

    /// Encodes `output = input weight^T` for some rows of a weight in blocks: rows of longer segments in tiles, all others
    /// eight at a time.
    fn blocks(
        &mut self,
        rows: Rows,
        from: &Arc<Buffer>,
        range: &Stored,
        to: &Arc<Buffer>,
        full: bool,
        weight: Weight,
    ) -> Result<()> {
        let outputs = range.rows.len() as u32;
        let params = self.linear_params(rows, from, range, to, full, weight);
        let many = Kernel::new("linear_many_blocks", 128, &params);
        let few = Kernel::new("linear_few_blocks", 512, &params);
        if rows == Rows::Tokens {
            self.launch(many.shared(STAGES_BYTES)?, move |metadata| {
                let tiles = metadata.several_rows.div_ceil(TILE) as u32;
                [outputs.div_ceil(TILE as u32), tiles, 1]
            });
        }
        self.launch(few, move |metadata| {
            let together = metadata.few(rows).div_ceil(8) as u32;
            [outputs.div_ceil(32), together, 1]
        });
        Ok(())
    }

    /// Encodes the rows of up to [`PRODUCTS`] products that are single tokens' or outputs'; all have rows of one kind and
    /// outputs of one type. The kernels differ in the number of rows for which they read a weight once; results are the same.
    fn few(&mut self, products: &[Dense]) {
        let Some(Dense { rows, full, .. }) = products.first() else {
            return;
        };
        let rows = *rows;
        let batch = Arc::clone(&self.batch);
        let each: [_; PRODUCTS] = std::array::from_fn(|n| products.get(n));
        let params = params::LinearFew {
            batch: &batch,
            rows: kind(rows),
            full: *full,
            input: each.map(|product| product.map(|product| &product.from)),
            weight: each.map(|product| product.map(|product| &product.weight)),
            output: each.map(|product| product.map(|product| &product.to)),
            columns: each.map(|product| product.map_or(0, |product| product.columns)),
            outputs: each.map(|product| product.map_or(0, |product| product.outputs)),
        };
        let outputs = products.iter().map(|product| product.outputs);
        let blocks: usize = outputs.map(|count| count.div_ceil(FEW_OUTPUTS)).sum();
        let mut most = 0;
        for (entry, together) in FEW {
            let kernel = Kernel::new(entry, 512, &params);
            let fewer = std::mem::replace(&mut most, together);
            self.launch(kernel, move |metadata| {
                let count = metadata.few(rows);
                let mine = count > fewer && (count <= together || together == FEWEST_READS);
                let groups = if mine { count.div_ceil(together) } else { 0 };
                [blocks as u32, groups as u32, 1]
            });
        }
    }
}
