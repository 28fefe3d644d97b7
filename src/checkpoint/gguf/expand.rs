//! The two tensors that a GGUF stores in another form than the published one, converted back: `A_log` and `kv_b_proj`.

use half::f16;

use super::super::Format;
use crate::config::Dtype;

/// `ln(-x)` of each value, since files store `-exp(A_log)`: f32 to f32. The error is the first value that no `A_log` gives,
/// with its index.
pub(super) fn a_log(stored: &[f32]) -> Result<Vec<u8>, (usize, f32)> {
    let wrong = |x: f32| !x.is_finite() || x >= 0.0;
    match stored.iter().position(|x| wrong(*x)) {
        Some(i) => Err((i, stored[i])),
        // In f64, so that the original number is restored wherever its exponential lost no precision.
        None => {
            let logarithm = |x: &f32| (-f64::from(*x)).ln() as f32;
            Ok(Dtype::F32.narrow(&stored.iter().map(logarithm).collect::<Vec<_>>()))
        }
    }
}

/// The sizes of `kv_b_proj`: `[heads * (nope + value), latent]`.
#[derive(Clone, Copy)]
pub(super) struct KvShape {
    pub(super) heads: usize,
    pub(super) nope: usize,
    pub(super) value: usize,
    pub(super) latent: usize,
}

/// One stored half of `kv_b_proj`.
pub(super) struct Half<'a> {
    pub(super) format: Format,
    pub(super) bytes: &'a [u8],
}

impl Half<'_> {
    fn widened(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.format.elements(self.bytes.len())];
        self.format.widen(self.bytes, &mut values);
        values
    }
}

/// `kv_b_proj` from keys `[heads, latent, nope]` and values `[heads, value, latent]`: per head the keys' rows, transposed,
/// and the values' rows below them.
///
/// Halves in one plain dtype keep their bits. Blocks run along the other axis and are widened: the result is in f16, or in
/// f32 if f16 does not hold the numbers.
pub(super) fn kv_b(keys: &Half<'_>, values: &Half<'_>, shape: KvShape) -> (Format, Vec<u8>) {
    if let (Format::Dense(dtype), true) = (keys.format, keys.format == values.format) {
        let size = dtype.size();
        let (keys, values) = (keys.bytes, values.bytes);
        let mut bytes = Vec::with_capacity(keys.len() + values.len());
        shape.lay(
            |at| bytes_of(keys, at, size),
            |range| {
                values
                    .get(range.start * size..range.end * size)
                    .unwrap_or_default()
            },
            |part: &[u8]| bytes.extend_from_slice(part),
        );
        return (Format::Dense(dtype), bytes);
    }
    let exact = [keys.format, values.format].contains(&Format::BF16)
        || [keys.format, values.format].contains(&Format::F32);
    let (keys, values) = (keys.widened(), values.widened());
    let mut all = Vec::with_capacity(keys.len() + values.len());
    shape.lay(
        |at| keys.get(at..=at).unwrap_or_default(),
        |range| values.get(range).unwrap_or_default(),
        |part: &[f32]| all.extend_from_slice(part),
    );
    narrowed(&all, exact)
}

/// Blocks of a whole `kv_b_proj`, widened.
pub(super) fn whole(stored: &Half<'_>) -> (Format, Vec<u8>) {
    narrowed(&stored.widened(), false)
}

/// In f16, or in f32 if that is requested or f16 does not hold the numbers.
fn narrowed(values: &[f32], exact: bool) -> (Format, Vec<u8>) {
    let fits = |x: &f32| f16::from_f32(*x).is_finite() || !x.is_finite();
    let dtype = if !exact && values.iter().all(fits) {
        Dtype::F16
    } else {
        Dtype::F32
    };
    (Format::Dense(dtype), dtype.narrow(values))
}

fn bytes_of(bytes: &[u8], at: usize, size: usize) -> &[u8] {
    bytes.get(at * size..(at + 1) * size).unwrap_or_default()
}

impl KvShape {
    /// Passes on the elements of `kv_b_proj` in order: keys one by one, values row by row.
    fn lay<'a, T: ?Sized + 'a>(
        self,
        key: impl Fn(usize) -> &'a T,
        value_rows: impl Fn(std::ops::Range<usize>) -> &'a T,
        mut put: impl FnMut(&'a T),
    ) {
        for head in 0..self.heads {
            for column in 0..self.nope {
                for latent in 0..self.latent {
                    put(key((head * self.latent + latent) * self.nope + column));
                }
            }
            let rows = self.value * self.latent;
            put(value_rows(head * rows..(head + 1) * rows));
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const SHAPE: KvShape = KvShape {
        heads: 2,
        nope: 2,
        value: 1,
        latent: 3,
    };

    fn f32s(bytes: &[u8]) -> Vec<f32> {
        Dtype::F32.widen(bytes)
    }

    #[test]
    fn keys_are_transposed_and_values_are_not() {
        // keys[h][latent][nope] and values[h][value][latent] whose values encode their indices.
        let keys: Vec<f32> = (0..12).map(|i| i as f32).collect();
        let values: Vec<f32> = (100..106).map(|i| i as f32).collect();
        let (keys, values) = (Dtype::F32.narrow(&keys), Dtype::F32.narrow(&values));
        let half = |bytes| Half {
            format: Format::F32,
            bytes,
        };
        let (format, bytes) = kv_b(&half(&keys), &half(&values), SHAPE);
        assert_eq!(format, Format::F32);
        #[rustfmt::skip]
        let expected = [
            0.0, 2.0, 4.0,  1.0, 3.0, 5.0,  100.0, 101.0, 102.0,
            6.0, 8.0, 10.0,  7.0, 9.0, 11.0,  103.0, 104.0, 105.0,
        ];
        assert_eq!(f32s(&bytes), expected);
    }

    #[test]
    fn unlike_halves_lose_nothing_but_to_f16() {
        let numbers: Vec<f32> = (0..12).map(|i| i as f32).collect();
        let f16s = Dtype::F16.narrow(&numbers);
        let bf16s = Dtype::Bf16.narrow(&numbers[..6]);
        let keys = Half {
            format: Format::F16,
            bytes: &f16s,
        };
        let values = Half {
            format: Format::BF16,
            bytes: &bf16s,
        };
        assert_eq!(kv_b(&keys, &values, SHAPE).0, Format::F32);
        assert_eq!(narrowed(&[1.0, 65_504.0], false).0, Format::F16);
        assert_eq!(narrowed(&[1.0, 65_536.0], false).0, Format::F32);
    }

    #[test]
    fn a_log_comes_back_and_what_is_none_is_refused() {
        let written: Vec<f32> = [0.0_f32, 1.5, 2.7, -3.0].iter().map(|x| -x.exp()).collect();
        let back = f32s(&a_log(&written).unwrap());
        for (x, expected) in back.iter().zip([0.0, 1.5, 2.7, -3.0]) {
            assert!((x - expected).abs() < 1e-6, "{x} instead of {expected}");
        }
        assert_eq!(a_log(&[-1.0, 0.5]), Err((1, 0.5)));
        assert_eq!(a_log(&[-1.0, -0.0]), Err((1, 0.0)));
        assert!(a_log(&[f32::NAN]).is_err());
        assert!(a_log(&[f32::NEG_INFINITY]).is_err());
    }
}
