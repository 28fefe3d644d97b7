//! Replaces cuBLASLt's products: a product on the host with the same rounding. bf16 operands, exact products, f32 sums in the
//! order of the columns, the result rounded to bf16 if that is its dtype. A row does not depend on the others.

/// Two bytes of bf16 as f32.
fn widen(two: &[u8]) -> f32 {
    f32::from_bits(u32::from(u16::from_le_bytes([two[0], two[1]])) << 16)
}

/// Rounds to nearest even, as the device does.
fn narrow(value: f32) -> [u8; 2] {
    let bits = value.to_bits();
    let rounded = if value.is_nan() {
        0x7fff
    } else {
        bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16
    };
    (rounded as u16).to_le_bytes()
}

/// Number of outputs that are summed in parallel.
const LANES: usize = 16;

/// `input [rows, columns]` times `weight [outputs, columns]`, transposed: `[rows, outputs]` in f32 if `full`, else bf16.
#[must_use]
pub fn product(input: &[u8], weight: &[u8], columns: usize, full: bool) -> Vec<u8> {
    let row = 2 * columns;
    let (rows, outputs) = (input.len() / row.max(1), weight.len() / row.max(1));
    let inputs: Vec<f32> = input.chunks_exact(2).map(widen).collect();
    let mut sums = vec![0.0_f32; rows * outputs];
    // Several rows of the weight in parallel, so that sums stay in order and still fill a vector.
    let mut panel = vec![[0.0_f32; LANES]; columns];
    for first in (0..outputs).step_by(LANES) {
        let count = LANES.min(outputs - first);
        for (lane, weight) in weight[first * row..(first + count) * row]
            .chunks_exact(row)
            .enumerate()
        {
            for (panel, two) in panel.iter_mut().zip(weight.chunks_exact(2)) {
                panel[lane] = widen(two);
            }
        }
        for (r, input) in inputs.chunks_exact(columns).enumerate() {
            let mut sum = [0.0_f32; LANES];
            for (panel, input) in panel.iter().zip(input) {
                for (sum, weight) in sum.iter_mut().zip(panel) {
                    *sum += input * weight;
                }
            }
            sums[r * outputs + first..][..count].copy_from_slice(&sum[..count]);
        }
    }
    if full {
        sums.iter().flat_map(|sum| sum.to_le_bytes()).collect()
    } else {
        sums.iter().flat_map(|sum| narrow(*sum)).collect()
    }
}
