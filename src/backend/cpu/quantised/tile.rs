//! Products of a few weight rows, taken apart, with rows of activations.

use super::activations::Activations;
use super::isa::Isa;
use super::unpack::Weights;

/// `output[c][r] = rows[r] . weights[c]`, for as many weights as `output` `[weights, rows]` has room for.
#[inline(always)]
pub(super) fn tiles<I: Isa>(isa: I, rows: &Activations, weights: &Weights, output: &mut [f32]) {
    let count = rows.count();
    let taken = output.len() / count;
    // Four rows of activations stay in the nearest cache while the weights pass by.
    let whole = count / 4 * 4;
    for r in (0..whole).step_by(4) {
        for c in (0..taken / 2 * 2).step_by(2) {
            tile::<I, 4, 2>(isa, rows, weights, [r, c], output);
        }
        for c in taken / 2 * 2..taken {
            tile::<I, 4, 1>(isa, rows, weights, [r, c], output);
        }
    }
    for r in whole..count {
        for c in (0..taken / 4 * 4).step_by(4) {
            tile::<I, 1, 4>(isa, rows, weights, [r, c], output);
        }
        for c in taken / 4 * 4..taken {
            tile::<I, 1, 1>(isa, rows, weights, [r, c], output);
        }
    }
}

/// `R x C` products, from row and weight `at` on. The order of each does not depend on R and C.
#[inline(always)]
fn tile<I: Isa, const R: usize, const C: usize>(
    isa: I,
    rows: &Activations,
    weights: &Weights,
    at: [usize; 2],
    output: &mut [f32],
) {
    let (count, blocks) = (rows.count(), rows.blocks());
    let activations: [_; R] = std::array::from_fn(|r| &rows.codes(at[0] + r)[..blocks]);
    let steps: [_; R] = std::array::from_fn(|r| &rows.scales(at[0] + r)[..blocks]);
    let codes: [_; C] = std::array::from_fn(|c| &weights.codes(at[1] + c)[..blocks]);
    let scales: [_; C] = std::array::from_fn(|c| &weights.scales(at[1] + c)[..blocks]);
    let mut sums = [[isa.load(&[0.0; 8]); C]; R];
    for block in 0..blocks {
        let weights: [_; C] = std::array::from_fn(|c| isa.codes(&codes[c][block]));
        let scales: [_; C] = std::array::from_fn(|c| isa.halves(scales[c][block]));
        for r in 0..R {
            for c in 0..C {
                let dot = isa.dot(weights[c], &activations[r][block]);
                let scale = isa.scale(scales[c], steps[r][block]);
                sums[r][c] = isa.mul_add(dot, scale, sums[r][c]);
            }
        }
    }
    for c in 0..C {
        for r in 0..R {
            let mut lanes = sums[r][c];
            if let Some(mins) = weights.mins(at[1] + c) {
                let mut sum = isa.load(&[0.0; 8]);
                for (mins, sums) in mins.iter().zip(rows.sums(at[0] + r)) {
                    sum = isa.mul_add(isa.load(mins), isa.load(sums), sum);
                }
                lanes = isa.add(lanes, sum);
            }
            output[(at[1] + c) * count + at[0] + r] = fold(isa.store(lanes));
        }
    }
}

/// The sum of the lanes: halves onto each other.
#[inline(always)]
fn fold(mut lanes: [f32; 8]) -> f32 {
    for half in [4, 2, 1] {
        for lane in 0..half {
            lanes[lane] += lanes[lane + half];
        }
    }
    lanes[0]
}
