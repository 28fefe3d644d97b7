//! The operations at the published model's sizes (48B, one device), for timings: a few decoded tokens, and a segment of a
//! prompt. The code is that of the cases; this file has only the sizes and the estimates of work.

use super::dense::{add, add_norm, embed, linear, rms_norm, swiglu};
use super::gates::{gated_norm, gates};
use super::kda::{against_definition, form_name};
use super::kda_input::KdaCase;
use super::moe::{RouteCase, experts, route};
use super::rows::definition;
use super::{choice, conv, mla, sample};
use crate::backend::{Draw, Element, Form, Segments};
use crate::checkpoint::Format;
use crate::conformance::oracle::{Attention, Router};
use crate::conformance::{Case, Gates, Tolerance};

const WIDTH: usize = 2304;
const HEADS: usize = 32;
const HEAD: usize = 128;
const CHANNELS: usize = 3 * HEADS * HEAD;

/// The timed cases.
pub(super) fn cases() -> Vec<Case> {
    let mut cases = dense();
    cases.extend(kda());
    cases.extend(attention());
    cases.extend(ffn());
    cases
}

fn dense() -> Vec<Case> {
    let mut cases = Vec::new();
    for t in [1, 256] {
        let name = format!("d={WIDTH}/T={t}");
        let case = definition("embed", &name, Tolerance::Rounded, move |ctx| {
            embed(ctx, Format::BF16, [4096, WIDTH], t)
        });
        cases.push(case.with_work(6 * t * WIDTH, 0));
        let case = definition("rms_norm", &name, Tolerance::Close, move |ctx| {
            rms_norm(ctx, Format::BF16, [t, WIDTH], 1.0, 1e-5)
        });
        cases.push(case.with_work(8 * t * WIDTH + 2 * WIDTH, 4 * t * WIDTH));
        let case = definition("add", &name, Tolerance::Rounded, move |ctx| {
            add(ctx, t, WIDTH)
        });
        cases.push(case.with_work(12 * t * WIDTH, t * WIDTH));
        let case = definition("add_norm", &name, Tolerance::Close, move |ctx| {
            add_norm(ctx, Format::BF16, [t, WIDTH], 1.0)
        });
        cases.push(case.with_work(16 * t * WIDTH + 2 * WIDTH, 5 * t * WIDTH));
    }
    for t in [1, 16, 256] {
        let (rows, name) = (HEADS * HEAD, format!("BF16/[4096,{WIDTH}]/T={t}"));
        let case = definition("linear", name, Tolerance::Close, move |ctx| {
            let matrix = ctx.random_matrix(Format::BF16, [1, rows, WIDTH], 0.02)?;
            linear(ctx, matrix, t, Element::Activation)
        });
        let bytes = 2 * rows * WIDTH + 4 * t * (rows + WIDTH);
        cases.push(case.with_work(bytes, 2 * t * rows * WIDTH));
    }
    let vocabulary = 163_840;
    let name = format!("vocabulary {vocabulary}/k=1");
    let case = Case::new("select", name, Tolerance::Full, move |ctx| {
        let values = ctx.random.normals(vocabulary, 1.0);
        choice::check(ctx, vocabulary, 1, &values)
    });
    cases.push(case.with_work(4 * vocabulary, 3 * vocabulary));
    for (top_p, temperature) in [(1.0, 0.0), (1.0, 1.0), (0.95, 1.0)] {
        let name = format!("vocabulary {vocabulary}/top_p={top_p}/temperature {temperature}");
        let case = Case::new("sample", name, Tolerance::Full, move |ctx| {
            let values = ctx.random.normals(vocabulary, 2.5);
            let draw = Draw {
                temperature,
                top_p,
                random: 0x9000_0000,
                ..Draw::best(0)
            };
            sample::check(ctx, vocabulary, &values, &[draw])
        });
        cases.push(case.with_work(4 * vocabulary, 3 * vocabulary));
    }
    cases
}

fn kda() -> Vec<Case> {
    let mut cases = Vec::new();
    for lengths in [&[1; 4][..], &[512]] {
        let t: usize = lengths.iter().sum();
        let name = format!("H={HEADS} K=V={HEAD}/T={t}");
        let shape = [HEADS, HEADS, HEAD, HEAD, 4];
        let case = Case::new("short_conv", &name, Tolerance::Close, move |ctx| {
            conv::against_definition(ctx, Format::BF16, shape, lengths, true)
        });
        let conv_states = lengths.len() * CHANNELS * 3;
        cases.push(case.with_work(
            4 * (2 * t * CHANNELS + 2 * conv_states) + 8 * CHANNELS,
            10 * t * CHANNELS,
        ));
        let case = definition("kda_gates", &name, Tolerance::Full, move |ctx| {
            gates(ctx, [t, HEADS, HEAD], -6.0, 6.0)
        });
        let elements = t * HEADS * (HEAD + 1);
        cases.push(case.with_work(8 * elements + 4 * HEADS * (HEAD + 1), 6 * elements));
        let form = if t == 512 { Form::Chunk } else { Form::Step };
        let case = Case::new(form_name(form), &name, Tolerance::Recurrence, move |ctx| {
            let shape = [HEADS, HEADS, HEAD, HEAD];
            let case = KdaCase::random(&mut ctx.random, shape, lengths, Gates::Wild, true);
            against_definition(ctx, &case, form)
        });
        let zero = KdaCase {
            shape: [HEADS, HEADS, HEAD, HEAD],
            lengths: lengths.to_vec(),
            qkv: Vec::new(),
            gates: Vec::new(),
            beta: Vec::new(),
            initial: None,
            expected: None,
        };
        let (bytes, flops) = zero.work(form);
        cases.push(case.with_work(bytes, flops));
        let case = definition("gated_norm", &name, Tolerance::Close, move |ctx| {
            gated_norm(ctx, [t, HEADS, HEAD], 1.0, 1e-5)
        });
        let elements = t * HEADS * HEAD;
        cases.push(case.with_work(12 * elements, 8 * elements));
    }
    cases
}

fn attention() -> Vec<Case> {
    let attention = Attention {
        heads: HEADS,
        latent: 512,
        nope: 128,
        rope: 64,
        value: 128,
    };
    let shape = mla::Shape {
        attention,
        block_tokens: 64,
        format: Format::BF16,
        cache: None,
        size: 1.0,
    };
    let (latent, key, value) = (512, 192, 128);
    let kv_b = 2 * HEADS * 256 * latent;
    let mut cases = Vec::new();
    let case = Case::new("mla_append", "512+64/T=256", Tolerance::Close, |ctx| {
        mla::append(ctx, [512, 64, 64], None, &[(0, 256)], 1.0, 1e-6)
    });
    cases.push(case.with_work(8 * 256 * 576, 4 * 256 * latent));
    let t = 256;
    let case = Case::new("mla_prefill", "H=32/T=256", Tolerance::Close, move |ctx| {
        mla::attend(ctx, shape, (true, Segments::All), &[(0, t)], 1.0)
    });
    let bytes = 4 * t * (HEADS * (key + value) + 576) + kv_b;
    let expand = 2 * t * HEADS * 256 * latent;
    cases.push(case.with_work(bytes, expand + HEADS * t * t * (key + value)));
    for position in [1023, 8191] {
        let name = format!("H=32/1 after {position}");
        let case = Case::new("mla_decode", name, Tolerance::Close, move |ctx| {
            mla::attend(ctx, shape, (false, Segments::All), &[(position, 1)], 1.0)
        });
        let bytes = 4 * ((position + 1) * 576 + HEADS * (key + value)) + kv_b;
        let flops = 2 * HEADS * (256 * latent + (position + 1) * (576 + latent));
        cases.push(case.with_work(bytes, flops));
    }
    cases
}

fn ffn() -> Vec<Case> {
    let mut cases = Vec::new();
    let (n, count) = (1024, 8);
    for t in [1, 64] {
        let case = RouteCase {
            router: Router {
                top_k: 8,
                groups: 1,
                top_groups: 1,
                renormalize: true,
                scale: 2.446,
            },
            experts: 256,
            d: WIDTH,
            tokens: t,
            bias: [-0.1, 0.1],
            format: Format::BF16,
        };
        let name = format!("256 choose 8/T={t}");
        let case = definition("route", name, Tolerance::Full, move |ctx| route(ctx, case));
        let (bytes, flops) = (2 * 256 * WIDTH + 4 * t * (WIDTH + 16), 2 * t * 256 * WIDTH);
        cases.push(case.with_work(bytes, flops));
        // As many experts as a token chooses: the weights that a decoded token reads.
        let name = format!("BF16/8 of [{n},{WIDTH}]/T={t} k=8");
        let case = definition("experts", name, Tolerance::Close, move |ctx| {
            experts(
                ctx,
                Format::BF16,
                [count, n, WIDTH],
                0..count,
                0..count,
                t,
                8,
            )
        });
        let (bytes, flops) = (6 * count * n * WIDTH + 8 * t * WIDTH, 6 * t * 8 * n * WIDTH);
        cases.push(case.with_work(bytes, flops));
        let name = format!("n=9216/T={t}");
        let case = definition("swiglu", name, Tolerance::Close, move |ctx| {
            swiglu(ctx, t, 9216, 1.0)
        });
        cases.push(case.with_work(12 * t * 9216, 5 * t * 9216));
    }
    cases
}
