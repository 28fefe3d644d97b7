//! `kda_block`, `mla_block`, `mlp_block` and `moe_block`: as the backend has them (fused, perhaps) against their
//! composition of single operations on the same backend, and against the oracle's composition.

use super::kda::{LAYER, piece, record};
use super::moe::clear_rows;
use crate::backend::{
    Batch, Block, Element, KdaBlock, LatentLayout, LatentRecord, MlaBlock, MlpBlock, MoeBlock,
    Piece, Result, Route, Slot, StateCheckpoint, StateLayout, Step, Tensor,
};
use crate::checkpoint::Format;
use crate::conformance::lab::plain;
use crate::conformance::oracle::{self, Attention, Recurrence, Router, widen};
use crate::conformance::{Case, Lab, Matrix, Tolerance, norm_error};

/// Tokens of the pieces of every batch below.
const LENGTHS: [usize; 5] = [1, 33, 0, 7, 1];

/// Block tables of those pieces, in no order.
const TABLES: [[u32; 3]; 5] = [[15, 7, 0], [2, 10, 3], [5, 13, 6], [8, 1, 9], [11, 4, 12]];

/// Records a block as the backend has it, or as its composition.
fn both(
    lab: &mut Lab<'_>,
    batch: &Batch,
    record: impl Fn(&mut dyn Step, bool) -> Result<()>,
    mut read: impl FnMut(&mut Lab<'_>) -> Result<Vec<Vec<f32>>>,
) -> Result<Vec<Vec<f32>>> {
    let mut results = Vec::new();
    for composed in [true, false] {
        let mut step = lab.step(batch)?;
        record(&mut *step, composed)?;
        lab.submit(&mut *step, batch)?;
        if lab.timed() && !composed {
            return Ok(Vec::new());
        }
        results.push(read(lab)?);
    }
    let fused = results.pop().unwrap_or_default();
    for (i, (fused, composed)) in fused.iter().zip(&results[0]).enumerate() {
        let error = norm_error(fused, &widen(composed));
        lab.within(
            format!("result {i} against the composition"),
            error,
            Tolerance::Block,
        );
    }
    Ok(fused)
}

fn projection(lab: &mut Lab<'_>, rows: usize, columns: usize) -> Result<Matrix> {
    lab.random_matrix(
        Format::Bf16,
        [1, rows, columns],
        (columns as f32).powf(-0.5),
    )
}

/// Key heads, value heads, K, V, the model's width and the gates' rank.
fn kda_block(lab: &mut Lab<'_>, [hk, hv, k, v, d, rank]: [usize; 6]) -> Result<()> {
    let tokens: usize = LENGTHS.iter().sum();
    let layout = StateLayout {
        layers: 2,
        key_heads: hk,
        value_heads: hv,
        key_width: k,
        value_width: v,
        taps: 4,
        slots: 3 * LENGTHS.len(),
    };
    let pool = lab.backend.state_pool(layout)?;
    let channels = layout.channels();
    let values = lab.activations(tokens * d, 1.0);
    let qkv_proj = projection(lab, channels, d)?;
    let conv = lab.random_matrix(Format::Bf16, [1, channels, 4], 0.5)?;
    let decay_proj = [projection(lab, rank, d)?, projection(lab, hv * k, rank)?];
    let beta_proj = projection(lab, hv, d)?;
    let a_log = (0..hv).map(|_| 2.0 * lab.random.uniform()).collect();
    let a_log = lab.matrix(Format::F32, [1, hv, 1], a_log)?;
    let dt_bias = (0..hv * k)
        .map(|_| -5.0 + 5.0 * lab.random.uniform())
        .collect();
    let dt_bias = lab.matrix(Format::F32, [1, hv * k, 1], dt_bias)?;
    let gate_proj = [projection(lab, rank, d)?, projection(lab, hv * v, rank)?];
    let norm = lab.norm_weight(Format::Bf16, v)?;
    let output_proj = projection(lab, d, hv * v)?;
    let mut plan = |width, element| lab.blank(crate::backend::Rows::Tokens, tokens, width, element);
    let (activation, f32) = (Element::Activation, Element::F32);
    let block = KdaBlock {
        input: plan(d, activation)?,
        qkv_proj: qkv_proj.weight,
        conv: conv.weight,
        decay_proj: [decay_proj[0].weight, decay_proj[1].weight],
        beta_proj: beta_proj.weight,
        a_log: a_log.weight,
        dt_bias: dt_bias.weight,
        gate_proj: [gate_proj[0].weight, gate_proj[1].weight],
        output_norm: (norm.weight, 1e-5),
        output_proj: output_proj.weight,
        pool,
        layer: LAYER,
        qkv: plan(channels, activation)?,
        qkv_conv: plan(channels, activation)?,
        gate_rank: plan(rank, activation)?,
        decay: plan(hv * k, activation)?,
        gates: plan(hv * k, f32)?,
        write: plan(hv, activation)?,
        beta: plan(hv, f32)?,
        heads: plan(hv * v, activation)?,
        gate: plan(hv * v, activation)?,
        normed: plan(hv * v, activation)?,
        output: plan(d, activation)?,
    };
    lab.fill(block.input, &values)?;
    // Every other sequence has a past; the long one keeps a checkpoint.
    let mut pieces = Vec::new();
    let mut pasts = Vec::new();
    for (i, length) in LENGTHS.into_iter().enumerate() {
        let slot = Slot(i as u32);
        let state = lab.random.normals(layout.state_len(), 0.3);
        let tail = lab.activations(layout.tail_len(), 1.0);
        let past = record(&layout, &state, &tail);
        let seeded = i % 2 == 1;
        if seeded {
            lab.backend.write_state(&pool, LAYER, slot, &past)?;
        }
        let slot_out = Slot((LENGTHS.len() + i) as u32);
        let mut piece = piece(length, seeded.then_some(slot), slot_out);
        if length > 16 {
            piece.checkpoints.push(StateCheckpoint {
                after: 16,
                slot: Slot(2 * LENGTHS.len() as u32),
            });
        }
        pieces.push(piece);
        pasts.push(seeded.then_some((state, tail)));
    }
    let batch = Batch {
        tokens: vec![0; tokens],
        pieces: pieces.clone(),
        outputs: Vec::new(),
    };
    let found = both(
        lab,
        &batch,
        |step, composed| {
            if composed {
                block.compose(step)
            } else {
                step.kda_block(&block)
            }
        },
        |lab| {
            let mut results = vec![lab.read(block.output, tokens)?];
            lab.poison(block.output)?;
            for piece in &pieces {
                let kept = piece.checkpoints.iter().map(|checkpoint| checkpoint.slot);
                for slot in kept.chain([piece.slot_out]) {
                    let record = lab.backend.read_state(&pool, LAYER, slot).wait()?;
                    results.push(record.key_value().into_owned());
                    results.push(record.tail);
                }
            }
            Ok(results)
        },
    )?;
    if lab.timed() {
        return Ok(());
    }

    let x = widen(&values);
    let through = |pair: &[Matrix; 2]| {
        let low = oracle::linear(&x, &pair[0].values, d);
        oracle::linear(&low, &pair[1].values, rank)
    };
    let qkv = oracle::linear(&x, &qkv_proj.values, d);
    let gates = oracle::log_decay(&through(&decay_proj), &a_log.values, &dt_bias.values);
    let beta = oracle::write_strength(&oracle::linear(&x, &beta_proj.values, d));
    let (mut heads, mut first) = (Vec::new(), 0);
    let mut next = 1;
    for (i, piece) in pieces.iter().enumerate() {
        let (state, tail) = pasts[i].as_ref().map_or_else(
            || (vec![0.0; layout.state_len()], vec![0.0; layout.tail_len()]),
            |(state, tail)| (widen(state), widen(tail)),
        );
        let of = |values: &[f64], width: usize, from: usize, to: usize| {
            values[(first + from) * width..(first + to) * width].to_vec()
        };
        let inputs = of(&qkv, channels, 0, piece.length);
        let (mixed, tails) = oracle::short_conv(&inputs, &conv.values, channels, &tail);
        let mut recurrence = Recurrence {
            key_heads: hk,
            value_heads: hv,
            key_width: k,
            value_width: v,
            state,
        };
        let kept = piece.checkpoints.iter().map(|checkpoint| checkpoint.after);
        let mut from = 0;
        for to in kept.chain([piece.length]) {
            heads.extend(recurrence.tokens(
                &mixed[from * channels..to * channels],
                &of(&gates, hv * k, from, to),
                &of(&beta, hv, from, to),
            ));
            lab.close(
                format!("the state of sequence {i} after {to}"),
                &found[next],
                &recurrence.state,
            );
            lab.close(
                format!("the tail of sequence {i} after {to}"),
                &found[next + 1],
                &tails[to],
            );
            (from, next) = (to, next + 2);
        }
        first += piece.length;
    }
    let normed = oracle::gated_norm(&heads, &through(&gate_proj), &norm.values, 1e-5);
    let answer = oracle::linear(&normed, &output_proj.values, hv * v);
    lab.close("the output", &found[0], &answer);
    Ok(())
}

fn mla_block(lab: &mut Lab<'_>, attention: Attention, d: usize) -> Result<()> {
    let Attention {
        heads,
        latent,
        nope,
        rope,
        value,
    } = attention;
    let tokens: usize = LENGTHS.iter().sum();
    let positions = [0, 5, 3, 18, 31];
    let (block_tokens, blocks) = (16, 16);
    let pool = lab.backend.latent_pool(LatentLayout {
        layers: 2,
        latent,
        rope,
        block_tokens,
        blocks,
        dtype: lab.backend.device().cache,
    })?;
    let values = lab.activations(tokens * d, 1.0);
    let query_proj = projection(lab, heads * (nope + rope), d)?;
    let kv_a_proj = projection(lab, latent + rope, d)?;
    let norm = lab.norm_weight(Format::Bf16, latent)?;
    let kv_b_proj = projection(lab, heads * (nope + value), latent)?;
    let output_proj = projection(lab, d, heads * value)?;
    let input = lab.input(d, Element::Activation, &values)?;
    let block = MlaBlock {
        input,
        query_proj: query_proj.weight,
        kv_a_proj: kv_a_proj.weight,
        kv_a_norm: (norm.weight, 1e-6),
        kv_b_proj: kv_b_proj.weight,
        output_proj: output_proj.weight,
        nope,
        value,
        pool,
        layer: LAYER,
        query: lab.output(tokens, heads * (nope + rope))?,
        kv_a: lab.output(tokens, latent + rope)?,
        heads: lab.output(tokens, heads * value)?,
        output: lab.output(tokens, d)?,
    };
    // Each sequence has three blocks, and a past where its position says so.
    let mut pieces: Vec<Piece> = Vec::new();
    let mut pasts = Vec::new();
    for (i, length) in LENGTHS.into_iter().enumerate() {
        let table = TABLES[i].map(Block).to_vec();
        let rows = lab.random.normals(positions[i] * (latent + rope), 1.0);
        let rows = lab.cached(rows);
        for (rows, block) in rows.chunks(block_tokens * (latent + rope)).zip(&table) {
            let record = LatentRecord {
                latent,
                rope,
                rows: rows.to_vec(),
            };
            lab.backend.write_latents(&pool, LAYER, *block, &record)?;
        }
        pasts.push(rows);
        pieces.push(Piece {
            position: positions[i],
            blocks: table,
            ..piece(length, None, Slot(i as u32))
        });
    }
    let batch = Batch {
        tokens: vec![0; tokens],
        pieces,
        outputs: Vec::new(),
    };
    let found = both(
        lab,
        &batch,
        |step, composed| {
            if composed {
                block.compose(step)
            } else {
                step.mla_block(&block)
            }
        },
        |lab| {
            let output = lab.read(block.output, tokens)?;
            lab.poison(block.output)?;
            Ok(vec![output])
        },
    )?;
    if lab.timed() {
        return Ok(());
    }

    let x = widen(&values);
    let queries = oracle::linear(&x, &query_proj.values, d);
    let appended = oracle::linear(&x, &kv_a_proj.values, d);
    let appended = oracle::append(&appended, &norm.values, rope, 1e-6);
    let (mut context, mut first) = (Vec::new(), 0);
    for (i, length) in LENGTHS.into_iter().enumerate() {
        let of =
            |values: &[f64], width: usize| values[first * width..(first + length) * width].to_vec();
        let mut rows = widen(&pasts[i]);
        rows.extend(of(&appended, latent + rope));
        let queries = of(&queries, heads * (nope + rope));
        context.extend(attention.attend(&queries, &kv_b_proj.values, &rows, positions[i]));
        first += length;
    }
    let answer = oracle::linear(&context, &output_proj.values, heads * value);
    lab.close("the output", &found[0], &answer);
    Ok(())
}

/// A gated MLP planned on a device, and the oracle's answer for these rows.
fn mlp(
    lab: &mut Lab<'_>,
    input: Tensor,
    values: &[f32],
    n: usize,
    reduce: bool,
) -> Result<(MlpBlock, Vec<f64>)> {
    let (d, tokens) = (input.width, values.len() / input.width);
    let (gate_up, down) = (projection(lab, 2 * n, d)?, projection(lab, d, n)?);
    let hidden = oracle::swiglu(&oracle::linear(&widen(values), &gate_up.values, d), n);
    let block = MlpBlock {
        input,
        gate_up_proj: gate_up.weight,
        down_proj: down.weight,
        gate_up: lab.output(tokens, 2 * n)?,
        hidden: lab.output(tokens, n)?,
        output: lab.output(tokens, d)?,
        reduce,
    };
    Ok((block, oracle::linear(&hidden, &down.values, n)))
}

fn mlp_block(lab: &mut Lab<'_>, tokens: usize, d: usize, n: usize) -> Result<()> {
    let values = lab.activations(tokens * d, 1.0);
    let input = lab.input(d, Element::Activation, &values)?;
    let (block, answer) = mlp(lab, input, &values, n, true)?;
    let found = both(
        lab,
        &plain(tokens),
        |step, composed| {
            if composed {
                block.compose(step)
            } else {
                step.mlp_block(&block)
            }
        },
        |lab| {
            let output = lab.read(block.output, tokens)?;
            lab.poison(block.output)?;
            Ok(vec![output])
        },
    )?;
    if lab.timed() {
        return Ok(());
    }
    lab.close_rows("the output", d, &found[0], &answer);
    Ok(())
}

fn moe_block(
    lab: &mut Lab<'_>,
    router: Router,
    [experts, n, d, shared]: [usize; 4],
    tokens: usize,
) -> Result<()> {
    let weight = projection(lab, experts, d)?;
    let bias = lab.random_matrix(Format::Bf16, [1, experts, 1], 0.1)?;
    let values = clear_rows(lab, router, &weight.values, &bias.values, tokens);
    let input = lab.input(d, Element::Activation, &values)?;
    let (rows, columns) = ((d as f32).powf(-0.5), (n as f32).powf(-0.5));
    let gate = lab.random_matrix(Format::Bf16, [experts, n, d], rows)?;
    let up = lab.random_matrix(Format::Bf16, [experts, n, d], rows)?;
    let down = lab.random_matrix(Format::Bf16, [experts, d, n], columns)?;
    let (ids, weights) = router.route(&widen(&values), &weight.values, &bias.values);
    let stacks = [&gate.values[..], &up.values, &down.values];
    let mut answer = oracle::experts(&widen(&values), &ids, &weights, stacks, 0, [experts, n, d]);
    let mut block = MoeBlock {
        route: Route {
            input,
            weight: weight.weight,
            bias: bias.weight,
            groups: router.groups,
            top_groups: router.top_groups,
            renormalize: router.renormalize,
            scale: router.scale,
            experts: lab.blank(
                crate::backend::Rows::Tokens,
                tokens,
                router.top_k,
                Element::Index,
            )?,
            weights: lab.blank(
                crate::backend::Rows::Tokens,
                tokens,
                router.top_k,
                Element::F32,
            )?,
        },
        gate: gate.weight,
        up: up.weight,
        down: down.weight,
        first_expert: 0,
        shared: None,
        output: lab.output(tokens, d)?,
    };
    if shared > 0 {
        let (mlp, extra) = mlp(lab, input, &values, shared, false)?;
        block.shared = Some(mlp);
        answer
            .iter_mut()
            .zip(extra)
            .for_each(|(sum, extra)| *sum += extra);
    }
    let found = both(
        lab,
        &plain(tokens),
        |step, composed| {
            if composed {
                block.compose(step)
            } else {
                step.moe_block(&block)
            }
        },
        |lab| {
            let output = lab.read(block.output, tokens)?;
            lab.poison(block.output)?;
            Ok(vec![output])
        },
    )?;
    if lab.timed() {
        return Ok(());
    }
    lab.close_rows("the output", d, &found[0], &answer);
    Ok(())
}

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for shape in [
        [3, 3, 32, 32, 40, 24],
        [1, 1, 128, 128, 64, 128],
        [2, 4, 20, 33, 36, 12],
    ] {
        let [hk, hv, k, v, d, rank] = shape;
        let name = format!("H={hk},{hv} K={k} V={v} d={d} rank={rank}");
        cases.push(Case::new("kda_block", name, Tolerance::Block, move |lab| {
            kda_block(lab, shape)
        }));
    }
    for (heads, latent, nope, rope, value, d) in
        [(3, 36, 20, 4, 33, 40), (2, 512, 128, 64, 128, 64)]
    {
        let attention = Attention {
            heads,
            latent,
            nope,
            rope,
            value,
        };
        let name = format!("H={heads} {nope}+{rope} over {latent} d={d}");
        cases.push(Case::new("mla_block", name, Tolerance::Block, move |lab| {
            mla_block(lab, attention, d)
        }));
    }
    for (tokens, d, n) in [(1, 40, 48), (33, 40, 48), (5, 33, 21), (64, 64, 128)] {
        let name = format!("d={d} n={n}/T={tokens}");
        cases.push(Case::new("mlp_block", name, Tolerance::Block, move |lab| {
            mlp_block(lab, tokens, d, n)
        }));
    }
    for (groups, top_groups, shape, tokens) in [
        (1, 1, [8, 24, 40, 32], 33),
        (4, 2, [16, 20, 33, 21], 17),
        (1, 1, [8, 24, 40, 0], 1),
        (1, 1, [32, 16, 64, 16], 1),
    ] {
        let router = Router {
            top_k: 4,
            groups,
            top_groups,
            renormalize: true,
            scale: 2.446,
        };
        let [experts, n, d, shared] = shape;
        let name =
            format!("{experts} experts in {groups} of n={n} d={d} shared={shared}/T={tokens}");
        cases.push(Case::new("moe_block", name, Tolerance::Block, move |lab| {
            moe_block(lab, router, shape, tokens)
        }));
    }
    cases
}
