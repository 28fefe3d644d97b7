//! Which token a draw selects.

use crate::backend::Draw;

/// How far a token is from being the one that a draw of a row selects: 0 if its range of the cumulative probability over the
/// kept tokens, in the order of ids, contains the random number, otherwise the distance; 1 for a token that is not kept. A
/// token that `top_p` or `min_p` would keep with a share that differs by `slack` counts as kept.
#[must_use]
pub fn sample_error(row: &[f32], draw: &Draw, token: Option<u32>, slack: f64) -> f64 {
    let order = sample_order(row, draw);
    let (Some(token), Some(best)) = (token, order.first()) else {
        return f64::from(token.is_some() || !order.is_empty());
    };
    if draw.temperature == 0.0 {
        return f64::from(token != best.0);
    }
    let weights: Vec<f64> = order
        .iter()
        .map(|(_, logit)| ((f64::from(*logit) - f64::from(best.1)) / draw.temperature).exp())
        .collect();
    let errors = [-slack, 0.0, slack].map(|slack| {
        let kept = kept(&weights, draw, slack);
        let mut kept: Vec<(u32, f64)> = kept.map(|i| (order[i].0, weights[i])).collect();
        kept.sort_unstable_by_key(|(id, _)| *id);
        let total: f64 = kept.iter().map(|(_, weight)| weight).sum();
        let at = f64::from(draw.random) / 2_f64.powi(32);
        let mut before = 0.0;
        for (id, weight) in kept {
            let upto = before + weight / total;
            if id == token {
                return (before - at).max(at - upto).max(0.0);
            }
            before = upto;
        }
        1.0
    });
    errors.into_iter().fold(1.0, f64::min)
}

/// The tokens that a draw allows with their changed logits, which are f32, in the order in which they are kept.
#[must_use]
pub fn sample_order(row: &[f32], draw: &Draw) -> Vec<(u32, f32)> {
    let mut order: Vec<(u32, f32)> = (0..).zip(row.iter().copied()).collect();
    for change in draw.changes.iter() {
        let logit = &mut order[change.token as usize].1;
        let factor = if *logit > 0.0 {
            change.positive
        } else {
            change.negative
        };
        *logit *= factor;
        *logit += change.add;
        *logit = logit.clamp(f32::MIN, f32::MAX);
    }
    if let Some(allowed) = &draw.allowed {
        order.retain(|(id, _)| allowed[*id as usize / 32] & (1 << (id % 32)) != 0);
    }
    order.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    order
}

/// The indices that are kept of tokens in order, whose shares of the probability may differ by `slack`.
fn kept(weights: &[f64], draw: &Draw, slack: f64) -> impl Iterator<Item = usize> {
    let most = if draw.top_k == 0 {
        weights.len()
    } else {
        draw.top_k.min(weights.len())
    };
    let total: f64 = weights[..most].iter().sum();
    let (share, least) = (draw.top_p + slack, draw.min_p - slack);
    let mut reached = 0.0;
    let mut count = 0;
    for weight in &weights[..most] {
        let in_share = draw.top_p >= 1.0 || reached < share * total;
        if !in_share || (draw.min_p > 0.0 && *weight < least) {
            break;
        }
        reached += weight;
        count += 1;
    }
    0..count.max(1)
}
