//! Encodes dense products: of rows of longer segments by cuBLASLt, of other rows by kernels for few rows, several products a
//! launch.

use std::sync::Arc;

use super::machine::{Argument, Buffer, Product};
use super::step::{CudaStep, Kernel, STAGES_BYTES, TILE, arguments, kind};
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

/// Maximum number of products of a launch for few rows.
const FEW_PRODUCTS: usize = 4;
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

/// Columns `outputs` of `output = input weight^T`, which has `width` columns, for rows of a weight of any format and shape.
/// The number of input rows is word `counted` of the batch. Its grid has a block for 8 outputs by [`ANY_TOGETHER`] rows.
pub(super) fn any_shape(
    batch: &Arc<Buffer>,
    counted: u32,
    input: &Arc<Buffer>,
    [weight, format]: [Argument; 2],
    output: &Arc<Buffer>,
    full: bool,
    columns: usize,
    outputs: std::ops::Range<usize>,
    width: usize,
) -> Kernel {
    let full = u32::from(full);
    let (count, first) = (outputs.len(), outputs.start);
    let arguments = arguments![
        batch, counted, input, weight, format, output, full, columns, count, first, width
    ];
    Kernel::new("linear", 256, arguments)
}

impl CudaStep {
    /// Encodes products of which none reads the output of another: `output = input weight^T`.
    pub(super) fn products(&mut self, list: &[Linear]) -> Result<()> {
        let mut few = Vec::new();
        for op in list {
            few.extend(self.product_of_several(op)?);
        }
        for alike in few.chunk_by(|a, b| a.rows == b.rows && a.full == b.full) {
            alike.chunks(FEW_PRODUCTS).for_each(|some| self.few(some));
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
        let kernel = any_shape(
            &self.batch,
            kind(rows),
            from,
            range.arguments(),
            to,
            full,
            weight.columns,
            range.rows,
            weight.rows,
        );
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
        let [matrix, format] = range.arguments();
        let outputs = range.rows.len() as u32;
        let rest = arguments![
            from,
            matrix,
            format,
            to,
            u32::from(full),
            weight.columns,
            outputs,
            range.rows.start,
            weight.rows
        ];
        if rows == Rows::Tokens {
            let many = self.kernel("linear_many_blocks", 128, rest.clone());
            self.launch(many.shared(STAGES_BYTES)?, move |metadata| {
                let tiles = metadata.several_rows.div_ceil(TILE) as u32;
                [outputs.div_ceil(TILE as u32), tiles, 1]
            });
        }
        let counted = std::iter::once(Argument::from(kind(rows)));
        let few = self.kernel("linear_few_blocks", 512, counted.chain(rest));
        self.launch(few, move |metadata| {
            let together = metadata.few(rows).div_ceil(8) as u32;
            [outputs.div_ceil(32), together, 1]
        });
        Ok(())
    }

    /// Encodes the rows of up to [`FEW_PRODUCTS`] products that are single tokens' or outputs'; all have rows of one kind and
    /// outputs of one type. The kernels differ in the number of rows for which they read a weight once; results are the same.
    fn few(&mut self, products: &[Dense]) {
        let Some(Dense { rows, full, .. }) = products.first() else {
            return;
        };
        let rows = *rows;
        let mut list = arguments![kind(rows), u32::from(*full)].to_vec();
        for product in products {
            let Dense {
                from, weight, to, ..
            } = product;
            list.extend(arguments![
                from,
                weight,
                to,
                product.columns,
                product.outputs
            ]);
        }
        for _ in products.len()..FEW_PRODUCTS {
            let null = || Argument::Null;
            list.extend(arguments![null(), null(), null(), 0_u32, 0_u32]);
        }
        let outputs = products.iter().map(|product| product.outputs);
        let blocks: usize = outputs.map(|count| count.div_ceil(FEW_OUTPUTS)).sum();
        let mut most = 0;
        for (entry, together) in FEW {
            let kernel = self.kernel(entry, 512, list.clone());
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
