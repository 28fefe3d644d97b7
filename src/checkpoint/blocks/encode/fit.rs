//! Searches for the scales of a group: the arithmetic of ggml's `make_qx_quants`, `make_qkx3_quants` and `make_qp_quants`, operation by
//! operation, so that blocks are ggml's to the bit.
//!
//! Groups of a block are searched side by side, one in each lane of a vector. Sums run over the elements of a group in their order,
//! which is the order of the scalar code.

/// `L` elements of `G` groups: lane `g` of row `l` is element `l` of group `g`.
pub(super) type Lanes<const G: usize, const L: usize> = [[f32; G]; L];

/// Groups whose largest element is smaller than this are taken as zero.
pub(super) const ZERO: f32 = 1e-15;

/// The nearest integer, ties to even, of a number below 2^22 in size.
#[inline(always)]
pub(super) fn nearest(x: f32) -> i32 {
    // The sum has no fraction bits: they were rounded off, and its lowest 23 bits are the integer, offset by 2^22.
    ((x + 12_582_912.0).to_bits() & 0x007f_ffff).cast_signed() - 0x0040_0000
}

/// Groups of `L` consecutive elements as lanes.
#[inline(always)]
pub(super) fn lanes<const G: usize, const L: usize>(values: &[f32]) -> Lanes<G, L> {
    let mut lanes = [[0.0; G]; L];
    for (g, group) in values.chunks_exact(L).enumerate().take(G) {
        for (lane, value) in lanes.iter_mut().zip(group) {
            lane[g] = *value;
        }
    }
    lanes
}

/// The integers of a fitted group are `clamp(nearest(inverse * (x - low)))`.
pub(super) struct Fit<const G: usize> {
    /// The scale of each group.
    pub(super) scale: [f32; G],
    /// What is subtracted from the products of scale and integer: 0 or more.
    pub(super) min: [f32; G],
    inverse: [f32; G],
    low: [f32; G],
}

impl<const G: usize> Fit<G> {
    /// The integers that the search found, in the range of its levels.
    #[inline(always)]
    pub(super) fn codes<const L: usize>(
        &self,
        x: &Lanes<G, L>,
        [least, most]: [i32; 2],
    ) -> [[i32; G]; L] {
        let mut codes = [[0; G]; L];
        for (codes, x) in codes.iter_mut().zip(x) {
            for g in 0..G {
                codes[g] = nearest(self.inverse[g] * (x[g] - self.low[g])).clamp(least, most);
            }
        }
        codes
    }
}

/// `x ~ scale * q - min` with `q` in `0..=levels` and `min >= 0`, by weighted least squares over the integers of `tries` inverse scales
/// `(first + i * step + levels) / (max - min)`. A try that is better sets the minimum of the next ones.
#[inline(always)]
pub(super) fn with_minimum<const G: usize, const L: usize>(
    x: &Lanes<G, L>,
    weights: &Lanes<G, L>,
    levels: i32,
    [first, step]: [f32; 2],
    tries: u8,
) -> Fit<G> {
    let (mut min, max) = range(x);
    let mut sum_w = weights[0];
    let mut sum_x = [0.0; G];
    for g in 0..G {
        sum_x[g] = sum_w[g] * x[0][g];
    }
    for (x, w) in x.iter().zip(weights).skip(1) {
        for g in 0..G {
            sum_w[g] += w[g];
            sum_x[g] += w[g] * x[g];
        }
    }
    let flat: [bool; G] = std::array::from_fn(|g| max[g] <= min[g]);
    let most = levels as f32;
    let mut best = Fit {
        scale: [0.0; G],
        min: [0.0; G],
        inverse: [0.0; G],
        low: min,
    };
    for g in 0..G {
        best.inverse[g] = most / (max[g] - min[g]);
        best.scale[g] = 1.0 / best.inverse[g];
    }
    let mut least = errors(x, weights, levels, &best.inverse, &min, &best.scale, &min);
    for i in 0..tries {
        let mut inverse = [0.0; G];
        for g in 0..G {
            inverse[g] = (first + step * f32::from(i) + most) / (max[g] - min[g]);
        }
        let (mut sum_l, mut sum_l2, mut sum_xl) = ([0.0; G], [0.0; G], [0.0; G]);
        for (x, w) in x.iter().zip(weights) {
            for g in 0..G {
                let l = nearest(inverse[g] * (x[g] - min[g])).clamp(0, levels) as f32;
                sum_l[g] += w[g] * l;
                sum_l2[g] += w[g] * l * l;
                sum_xl[g] += w[g] * l * x[g];
            }
        }
        let (mut scale, mut low, mut solvable) = ([0.0; G], [0.0; G], [false; G]);
        for g in 0..G {
            let d = sum_w[g] * sum_l2[g] - sum_l[g] * sum_l[g];
            solvable[g] = d > 0.0;
            scale[g] = (sum_w[g] * sum_xl[g] - sum_x[g] * sum_l[g]) / d;
            low[g] = (sum_l2[g] * sum_x[g] - sum_l[g] * sum_xl[g]) / d;
            let above = low[g] > 0.0;
            scale[g] = if above {
                sum_xl[g] / sum_l2[g]
            } else {
                scale[g]
            };
            low[g] = if above { 0.0 } else { low[g] };
        }
        let error = errors(x, weights, levels, &inverse, &min, &scale, &low);
        for g in 0..G {
            let better = solvable[g] && error[g] < least[g];
            least[g] = if better { error[g] } else { least[g] };
            best.scale[g] = if better { scale[g] } else { best.scale[g] };
            best.inverse[g] = if better { inverse[g] } else { best.inverse[g] };
            best.low[g] = if better { min[g] } else { best.low[g] };
            min[g] = if better { low[g] } else { min[g] };
        }
    }
    for g in 0..G {
        best.scale[g] = if flat[g] { 0.0 } else { best.scale[g] };
        best.inverse[g] = if flat[g] { 0.0 } else { best.inverse[g] };
        best.min[g] = -min[g];
    }
    best
}

/// The smallest element of each group, or 0 if that is smaller, and the largest.
#[inline(always)]
fn range<const G: usize, const L: usize>(x: &Lanes<G, L>) -> ([f32; G], [f32; G]) {
    let (mut min, mut max) = (x[0], x[0]);
    for x in x {
        for g in 0..G {
            min[g] = if x[g] < min[g] { x[g] } else { min[g] };
            max[g] = if x[g] > max[g] { x[g] } else { max[g] };
        }
    }
    (min.map(|min| if min > 0.0 { 0.0 } else { min }), max)
}

/// The weighted squared error of `scale * q + low` with `q = clamp(nearest(inverse * (x - min)), 0, levels)`.
#[inline(always)]
fn errors<const G: usize, const L: usize>(
    x: &Lanes<G, L>,
    weights: &Lanes<G, L>,
    levels: i32,
    inverse: &[f32; G],
    min: &[f32; G],
    scale: &[f32; G],
    low: &[f32; G],
) -> [f32; G] {
    let mut error = [0.0; G];
    for (x, w) in x.iter().zip(weights) {
        for g in 0..G {
            let l = nearest(inverse[g] * (x[g] - min[g])).clamp(0, levels) as f32;
            let difference = scale[g] * l + low[g] - x[g];
            error[g] += w[g] * (difference * difference);
        }
    }
    error
}

/// `x ~ scale * q` with `q` in `-levels..levels`: the element of largest size is put on `-levels`, exactly or within a tenth of a level to
/// nine tenths, whichever gives the least weighted error.
#[inline(always)]
pub(super) fn symmetric<const G: usize, const L: usize>(
    x: &Lanes<G, L>,
    weights: &Lanes<G, L>,
    levels: i32,
) -> Fit<G> {
    let (mut size, mut extreme) = ([0.0; G], [0.0; G]);
    for x in x {
        for g in 0..G {
            let larger = x[g].abs() > size[g];
            extreme[g] = if larger { x[g] } else { extreme[g] };
            size[g] = if larger { x[g].abs() } else { size[g] };
        }
    }
    let most = levels as f32;
    let mut best = Fit {
        scale: [0.0; G],
        min: [0.0; G],
        inverse: [0.0; G],
        low: [0.0; G],
    };
    let mut most_explained = [0.0; G];
    for (i, tenths) in (-10..=9).enumerate() {
        // The first try is the exact one.
        let tenths = if i == 0 { 0 } else { tenths };
        if i > 0 && tenths == 0 {
            continue;
        }
        let mut inverse = [0.0; G];
        for g in 0..G {
            inverse[g] = -(most + 0.1 * tenths as f32) / extreme[g];
        }
        let (mut sum_lx, mut sum_l2) = ([0.0; G], [0.0; G]);
        for (x, w) in x.iter().zip(weights) {
            for g in 0..G {
                let l = nearest(inverse[g] * x[g]).clamp(-levels, levels - 1) as f32;
                sum_lx[g] += w[g] * x[g] * l;
                sum_l2[g] += w[g] * l * l;
            }
        }
        for g in 0..G {
            let some = sum_l2[g] > 0.0;
            let explains = some && sum_lx[g] * sum_lx[g] > most_explained[g] * sum_l2[g];
            let better = i == 0 || explains;
            let scale = if some { sum_lx[g] / sum_l2[g] } else { 0.0 };
            best.scale[g] = if better { scale } else { best.scale[g] };
            best.inverse[g] = if better { inverse[g] } else { best.inverse[g] };
            let explained = scale * sum_lx[g];
            most_explained[g] = if better { explained } else { most_explained[g] };
        }
    }
    for g in 0..G {
        let zero = size[g] < ZERO;
        best.scale[g] = if zero { 0.0 } else { best.scale[g] };
        best.inverse[g] = if zero { 0.0 } else { best.inverse[g] };
    }
    best
}

/// `x ~ scale * q` for numbers of 0 or more with `q` in `0..=levels`: the scales of a block's groups in integers. Searched from nine scales,
/// then one integer at a time while the weighted error falls.
pub(super) fn positive<const N: usize>(
    x: &[f32; N],
    weights: &[f32; N],
    levels: i32,
) -> (f32, [i32; N]) {
    let max = x
        .iter()
        .fold(0.0_f32, |max, x| if *x > max { *x } else { max });
    if max < ZERO {
        return (0.0, [0; N]);
    }
    let most = levels as f32;
    let error = |inverse: f32| {
        let scale = 1.0 / inverse;
        let mut error = 0.0;
        for (x, w) in x.iter().zip(weights) {
            let difference = x - scale * nearest(inverse * x).min(levels) as f32;
            error += w * difference * difference;
        }
        error
    };
    let mut inverse = most / max;
    let mut least = error(inverse);
    for tenths in [-4, -3, -2, -1, 1, 2, 3, 4] {
        let tried = (0.1 * tenths as f32 + most) / max;
        let found = error(tried);
        if found < least {
            (least, inverse) = (found, tried);
        }
    }
    let mut codes = x.map(|x| nearest(inverse * x).min(levels));
    let (mut sum_lx, mut sum_l2) = (0.0, 0.0);
    for ((x, w), l) in x.iter().zip(weights).zip(&codes) {
        let l = *l as f32;
        sum_lx += w * x * l;
        sum_l2 += w * l * l;
    }
    for _ in 0..5 {
        let mut changed = false;
        for ((x, w), code) in x.iter().zip(weights).zip(&mut codes) {
            let l = *code as f32;
            let (mut lx, mut l2) = (sum_lx - w * x * l, sum_l2 - w * l * l);
            if lx <= 0.0 || l2 <= 0.0 {
                continue;
            }
            let other = nearest(x * l2 / lx).min(levels);
            if other == *code {
                continue;
            }
            let l = other as f32;
            lx += w * x * l;
            l2 += w * l * l;
            if lx * lx * sum_l2 > sum_lx * sum_lx * l2 {
                (*code, sum_lx, sum_l2) = (other, lx, l2);
                changed = true;
            }
        }
        if !changed {
            break;
        }
    }
    let scale = if sum_l2 > 0.0 { sum_lx / sum_l2 } else { 0.0 };
    (scale, codes)
}
