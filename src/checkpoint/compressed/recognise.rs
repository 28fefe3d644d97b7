//! Recognises the scheme of a stored weight from names and dtypes, then checks it against the configuration.
//!
//! Layouts are those of compressed-tensors (`pack_quantized`, `naive_quantized`, `nvfp4_quantized`, `mxfp4_quantized`), of
//! DeepSeek's and ModelOpt's files, and of MLX (`mlx.core.quantize`).

use safetensors::Dtype;

use super::super::verify::{Check, Found};
use super::super::{Entry, header::DTYPES};
use super::expand::Expand;
use super::grid::{Grid, Number};
use super::{Packed, Repacked, Scales, Scheme, Stored, Zeros};
use crate::config::{ModelConfig, Quantization, QuantizedAs, Role, TensorSpec};

/// The result for a weight.
pub(in super::super) enum Taken {
    /// The weight is not quantised.
    Plain,
    /// The quantised weight.
    Quantised(Box<Entry>),
    /// The weight is quantised but invalid; the reason has been added to the problems.
    Refused,
}

/// The size of the blocks of FP8 scales if the configuration has none.
const BLOCK: [usize; 2] = [128, 128];
/// Columns of the blocks that weights are repacked into.
const COLUMNS: usize = 32;
/// Names of tensors beside a quantised weight that do not affect its values.
const UNUSED: [&str; 3] = ["input_scale", "input_global_scale", "weight_shape"];

/// Takes the matrix of `spec` and its scales, if it is quantised.
pub(in super::super) fn take(check: &mut Check, spec: &TensorSpec, config: &ModelConfig) -> Taken {
    if spec.role == Role::MlaExpand
        && let Some(expand) = Expand::take(check, spec.layer.unwrap_or_default(), config)
    {
        return taken(check, spec, expand.map(Repacked::Expand));
    }
    let [rows, columns] = spec.shape[..] else {
        return Taken::Plain;
    };
    let names = std::iter::once(&spec.name).chain(&spec.alias);
    let mut modules = names.filter_map(|name| name.strip_suffix(".weight"));
    let quantised = |module: &&str| {
        let dtype = |suffix: &str| Some(check.found.get(&format!("{module}.{suffix}"))?.dtype);
        let stored = [Dtype::I8, Dtype::U8, Dtype::U32, Dtype::F8_E4M3];
        dtype("weight_packed").is_some()
            || dtype("qweight").is_some()
            || dtype("weight").is_some_and(|dtype| stored.contains(&dtype))
    };
    let Some(module) = modules.find(quantised).map(str::to_owned) else {
        return Taken::Plain;
    };
    let mut weight = Weight {
        check,
        module,
        rows,
        columns,
        quantization: config.quantization.as_ref(),
    };
    let packed = weight.packed();
    taken(check, spec, packed.map(Repacked::Matrix))
}

fn taken(check: &mut Check, spec: &TensorSpec, repacked: Result<Repacked, String>) -> Taken {
    match repacked {
        Ok(repacked) => Taken::Quantised(Box::new(Entry {
            name: spec.name.clone(),
            format: repacked.format(),
            shape: spec.shape.clone(),
            shard: repacked.stored().first().map_or(0, |(shard, _)| *shard),
            range: 0..0,
            repacked: Some(repacked.into()),
        })),
        Err(problem) => {
            check.problems.push(problem);
            Taken::Refused
        }
    }
}

/// A quantised weight that is being recognised.
pub(super) struct Weight<'a> {
    pub(super) check: &'a mut Check,
    /// The name without `.weight`.
    pub(super) module: String,
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) quantization: Option<&'a Quantization>,
}

impl Weight<'_> {
    fn name(&self, suffix: &str) -> String {
        format!("{}.{suffix}", self.module)
    }

    fn find(&mut self, suffix: &str) -> Option<Found> {
        self.check.found.remove(&self.name(suffix))
    }

    fn wrong(&self, suffix: &str, expected: &str, found: &str) -> String {
        format!("{}: expected {expected}, found {found}", self.name(suffix))
    }

    fn need(&mut self, suffix: &str, expected: &str) -> Result<Found, String> {
        self.find(suffix)
            .ok_or_else(|| self.wrong(suffix, expected, "nothing"))
    }

    /// Claims all tensors of the weight, valid or not, so that none of them is reported as unexpected.
    pub(super) fn packed(&mut self) -> Result<Packed, String> {
        let packed = self.scheme();
        for suffix in UNUSED {
            self.find(suffix);
        }
        if packed.is_err() {
            let prefix = format!("{}.", self.module);
            self.check.found.retain(|name, _| {
                name.strip_prefix(&prefix)
                    .is_none_or(|rest| rest.contains('.'))
            });
        }
        let (packed, stored) = packed?;
        if let Some(quantization) = self.quantization {
            quantization
                .agrees(&self.module, &stored)
                .map_err(|problem| format!("{}: {problem}", self.module))?;
        }
        Ok(packed)
    }

    fn scheme(&mut self) -> Result<(Packed, QuantizedAs), String> {
        if self.find("qweight").is_some() {
            let expected = "a format that is read: compressed-tensors, FP8, MLX or GGUF";
            let found = "the layout of AutoAWQ or GPTQ, which is not: use such a version of the model, or the one in BF16";
            return Err(self.wrong("qweight", expected, found));
        }
        if let Some(found) = self.find("weight_packed") {
            return match found.dtype {
                Dtype::I32 => self.integers(found),
                Dtype::U8 => self.four_bit_floats("weight_packed", found),
                other => Err(self.wrong(
                    "weight_packed",
                    "dtype I32 or U8",
                    &format!("dtype {other}"),
                )),
            };
        }
        let found = self.need("weight", "codes")?;
        match found.dtype {
            Dtype::I8 => self.bytes(found),
            Dtype::F8_E4M3 => self.eight_bit_floats(found),
            Dtype::U8 => self.four_bit_floats("weight", found),
            Dtype::U32 => self.mlx(found),
            other => Err(self.wrong("weight", DTYPES, &format!("dtype {other}"))),
        }
    }

    /// Codes in rows of this many bytes; the shape is checked against it.
    fn codes(
        &self,
        suffix: &str,
        found: Found,
        (bits, width): (usize, usize),
    ) -> Result<Stored, String> {
        let each = (found.dtype.bitsize() / bits).max(1);
        let expected = [self.rows, width];
        if found.shape != expected {
            let expected = format!("{expected:?}, {each} codes of {bits} bits in each number",);
            return Err(self.wrong(suffix, &expected, &format!("{:?}", found.shape)));
        }
        Ok(Stored::from(found))
    }

    /// The bits per code, if the codes of a row fill `across` words of 32 bits.
    fn bits(&self, suffix: &str, found: &Found, accepted: &[usize]) -> Result<usize, String> {
        let across = found.shape.get(1).copied().unwrap_or(0);
        let fits = |bits: &&usize| {
            (**bits * self.columns).is_multiple_of(32) && **bits * self.columns / 32 == across
        };
        accepted.iter().find(fits).copied().ok_or_else(|| {
            let widths = accepted
                .iter()
                .map(|bits| (bits * self.columns).div_ceil(32).to_string());
            let expected = format!(
                "[{}, {}] for codes of {accepted:?} bits",
                self.rows,
                widths.collect::<Vec<_>>().join(" or ")
            );
            self.wrong(suffix, &expected, &format!("{:?}", found.shape))
        })
    }

    /// The scales of the weight. At least `run` columns must share one; `byte` gives the meaning of U8.
    fn scales(&mut self, suffix: &str, byte: Option<Number>, run: usize) -> Result<Scales, String> {
        let found = self.need(suffix, "the scales of the weight beside it")?;
        let Some(number) = Number::of(found.dtype, byte) else {
            let found = format!("dtype {}", found.dtype);
            return Err(self.wrong(
                suffix,
                "dtype BF16, F16 or F32, or one of 8-bit floats",
                &found,
            ));
        };
        let block = self
            .quantization
            .and_then(Quantization::block)
            .unwrap_or(BLOCK);
        let size = [self.rows, self.columns];
        let grid = Grid::of(&found.shape, size, block).ok_or_else(|| {
            let [rows, columns] = size;
            let expected = format!(
                "[1], [{rows}, 1], [{rows}, groups] with a divisor of {columns}, or [{}, {}] for blocks of {block:?}",
                rows.div_ceil(block[0].max(1)),
                columns.div_ceil(block[1].max(1)),
            );
            self.wrong(suffix, &expected, &format!("{:?}", found.shape))
        })?;
        if !self.columns.is_multiple_of(COLUMNS) || !grid.covers(run, self.columns) {
            let expected = format!(
                "rows of a multiple of {COLUMNS} columns and groups of a multiple of {run}"
            );
            let found = format!("{} columns in groups of {}", self.columns, grid.columns);
            return Err(self.wrong(suffix, &expected, &found));
        }
        Ok(Scales {
            stored: Stored::from(found),
            number,
            grid,
        })
    }

    fn matrix(&self, codes: Stored, bits: usize, scales: Scales, scheme: Scheme) -> Packed {
        Packed {
            rows: self.rows,
            columns: self.columns,
            row_bytes: codes.range.len() / self.rows.max(1),
            codes,
            bits,
            scales,
            scheme,
        }
    }

    /// compressed-tensors, `pack-quantized`.
    fn integers(&mut self, found: Found) -> Result<(Packed, QuantizedAs), String> {
        let bits = self.bits("weight_packed", &found, &[4, 8])?;
        let codes = self.codes("weight_packed", found, (bits, bits * self.columns / 32))?;
        if let Some(shape) = self.find("weight_shape") {
            let numbers = self.whole(&shape)?;
            let expected = [self.rows as i64, self.columns as i64];
            if numbers != expected {
                let (expected, found) = (format!("{expected:?}"), format!("{numbers:?}"));
                return Err(self.wrong("weight_shape", &expected, &found));
            }
        }
        if let Some(order) = self.find("weight_g_idx")
            && self.whole(&order)?.iter().any(|group| *group != -1)
        {
            let expected = "columns in the order of their groups (actorder null or \"weight\")";
            return Err(self.wrong("weight_g_idx", expected, "an order of its own"));
        }
        let scales = self.scales("weight_scale", None, 32)?;
        let zeros = self.zeros(bits, scales.grid)?;
        let stored = self.stored_as(bits, false, Some(zeros.is_none()), scales.grid);
        let scheme = Scheme::Integer {
            signed: false,
            zeros,
        };
        Ok((self.matrix(codes, bits, scales, scheme), stored))
    }

    /// compressed-tensors, `int-quantized` and `naive-quantized`.
    fn bytes(&mut self, found: Found) -> Result<(Packed, QuantizedAs), String> {
        let codes = self.codes("weight", found, (8, self.columns))?;
        let scales = self.scales("weight_scale", None, 32)?;
        let zeros = self.zeros(8, scales.grid)?;
        let stored = self.stored_as(8, false, Some(zeros.is_none()), scales.grid);
        let scheme = Scheme::Integer {
            signed: true,
            zeros,
        };
        Ok((self.matrix(codes, 8, scales, scheme), stored))
    }

    /// Zero points, one for each scale.
    fn zeros(&mut self, bits: usize, grid: Grid) -> Result<Option<Zeros>, String> {
        const NAME: &str = "weight_zero_point";
        let Some(found) = self.find(NAME) else {
            return Ok(None);
        };
        let down = self.rows.div_ceil(grid.rows);
        let elements: usize = found.shape.iter().product();
        let (expected, right) = match found.dtype {
            Dtype::I8 => (down, elements == down * grid.across),
            _ => {
                let words = (self.rows * bits).div_ceil(32);
                (words, grid.rows == 1 && found.shape == [words, grid.across])
            }
        };
        match found.dtype {
            Dtype::I8 if right => Ok(Some(Zeros::Signed(Stored::from(found)))),
            Dtype::I32 if right => Ok(Some(Zeros::Packed(Stored::from(found)))),
            Dtype::I8 | Dtype::I32 => {
                let expected = format!("[{expected}, {}], one for each scale", grid.across);
                Err(self.wrong(NAME, &expected, &format!("{:?}", found.shape)))
            }
            other => Err(self.wrong(NAME, "dtype I8, or I32 packed", &format!("dtype {other}"))),
        }
    }

    /// FP8 of compressed-tensors (`weight_scale`) and of DeepSeek (`weight_scale_inv`, which is a factor in spite of its
    /// name).
    fn eight_bit_floats(&mut self, found: Found) -> Result<(Packed, QuantizedAs), String> {
        let codes = self.codes("weight", found, (8, self.columns))?;
        let inverse = self
            .check
            .found
            .contains_key(&self.name("weight_scale_inv"));
        let suffix = if inverse {
            "weight_scale_inv"
        } else {
            "weight_scale"
        };
        let scales = self.scales(suffix, None, 32)?;
        let stored = self.stored_as(8, true, None, scales.grid);
        Ok((self.matrix(codes, 8, scales, Scheme::Float8), stored))
    }

    /// NVFP4 and MXFP4 of compressed-tensors, and NVFP4 of ModelOpt: two codes per byte.
    fn four_bit_floats(
        &mut self,
        suffix: &str,
        found: Found,
    ) -> Result<(Packed, QuantizedAs), String> {
        let codes = self.codes(suffix, found, (4, self.columns / 2))?;
        let scales = self.scales("weight_scale", Some(Number::E8m0), 16)?;
        let (name, divides) = match suffix {
            "weight_packed" => ("weight_global_scale", true),
            _ => ("weight_scale_2", false),
        };
        let (group, scheme) = match scales.number {
            Number::E8m0 => (32, Scheme::Float4),
            Number::E4m3 => {
                let global = self.need(name, "the scale of the whole weight")?;
                let elements: usize = global.shape.iter().product();
                if (global.dtype, elements) != (Dtype::F32, 1) {
                    let found = format!("dtype {}, {:?}", global.dtype, global.shape);
                    return Err(self.wrong(name, "one number in F32", &found));
                }
                let global = Stored::from(global);
                (16, Scheme::Float4Global { global, divides })
            }
            _ => {
                let expected = "8-bit floats: e4m3 (NVFP4) or e8m0 (MXFP4)";
                return Err(self.wrong("weight_scale", expected, "others"));
            }
        };
        self.groups("weight_scale", scales.grid, group)?;
        let stored = self.stored_as(4, true, None, scales.grid);
        Ok((self.matrix(codes, 4, scales, scheme), stored))
    }

    /// MLX: `affine` has biases, the modes `mxfp4`, `mxfp8` and `nvfp4` have scales of a byte each.
    fn mlx(&mut self, found: Found) -> Result<(Packed, QuantizedAs), String> {
        let affine = self.check.found.contains_key(&self.name("biases"));
        let scale = self.check.found.get(&self.name("scales"));
        let across = scale.and_then(|scale| scale.shape.get(1)).copied();
        let bytes = scale.is_some_and(|scale| scale.dtype == Dtype::U8);
        if !affine && !bytes {
            let expected = "biases beside scales in BF16, F16 or F32";
            return Err(match scale {
                Some(_) => self.wrong("biases", expected, "nothing"),
                None => self.wrong("scales", "the scales of the weight beside it", "nothing"),
            });
        }
        let accepted: &[usize] = if affine { &[2, 3, 4, 5, 6, 8] } else { &[4, 8] };
        let bits = self.bits("weight", &found, accepted)?;
        let codes = self.codes("weight", found, (bits, bits * self.columns / 32))?;
        if affine {
            let scales = self.scales("scales", None, 32)?;
            let biases = self.scales("biases", None, 32)?;
            if (biases.grid, biases.number) != (scales.grid, scales.number) {
                let expected = "the shape and dtype of scales";
                return Err(self.wrong("biases", expected, "others"));
            }
            let stored = self.stored_as(bits, false, None, scales.grid);
            let scheme = Scheme::Affine { biases };
            return Ok((self.matrix(codes, bits, scales, scheme), stored));
        }
        let sixteens = across.is_some_and(|across| across * 16 == self.columns);
        let (number, group) = match sixteens {
            true => (Number::E4m3, 16),
            false => (Number::E8m0, 32),
        };
        let scales = self.scales("scales", Some(number), group)?;
        self.groups("scales", scales.grid, group)?;
        let stored = self.stored_as(bits, true, None, scales.grid);
        let scheme = match bits {
            4 => Scheme::Float4,
            _ => Scheme::Float8,
        };
        Ok((self.matrix(codes, bits, scales, scheme), stored))
    }

    fn groups(&self, suffix: &str, grid: Grid, group: usize) -> Result<(), String> {
        if (grid.rows, grid.columns) == (1, group) {
            return Ok(());
        }
        let expected = format!("one for each {group} columns of a row");
        let found = format!("one for each {} x {}", grid.rows, grid.columns);
        Err(self.wrong(suffix, &expected, &found))
    }

    fn stored_as(
        &self,
        bits: usize,
        float: bool,
        symmetric: Option<bool>,
        grid: Grid,
    ) -> QuantizedAs {
        let group = (grid.rows == 1 && grid.columns < self.columns).then_some(grid.columns);
        QuantizedAs {
            bits,
            float,
            symmetric,
            group,
        }
    }

    /// A short list of whole numbers.
    fn whole(&self, found: &Found) -> Result<Vec<i64>, String> {
        // Not through the shard's own mapping, which would keep the pages around each of thousands of such lists in memory.
        let bytes = Stored::from(found.clone()).window(&self.check.shards);
        let bytes = bytes.map_err(|error| error.to_string())?;
        Ok(match found.dtype {
            Dtype::I64 => {
                let numbers = bytes.as_chunks().0.iter();
                numbers.map(|b| i64::from_le_bytes(*b)).collect()
            }
            Dtype::I32 => {
                let numbers = bytes.as_chunks().0.iter();
                numbers.map(|b| i64::from(i32::from_le_bytes(*b))).collect()
            }
            _ => Vec::new(),
        })
    }
}

impl From<Found> for Stored {
    fn from(found: Found) -> Self {
        Self {
            shard: found.shard,
            range: found.range,
        }
    }
}
