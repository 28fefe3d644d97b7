//! The parameters of each shader, field by field as its `struct Params` has them; a test holds the two together.

/// Structs of parameters, and the shaders that take each.
macro_rules! params {
    ($($name:ident of $($shader:literal),+ { $($field:ident: $type:ty),* $(,)? })*) => {
        $(
            #[doc = concat!("Parameters of `", $($shader, "` `",)+ "`.")]
            #[repr(C)]
            #[derive(Clone, Copy, Debug, Default, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
            pub(super) struct $name {
                $(pub(super) $field: $type),*
            }
        )*

        #[cfg(test)]
        const ALL: &[(&[&str], &[(&str, &str)])] =
            &[$((&[$($shader),+], &[$((stringify!($field), stringify!($type))),*])),*];
    };
}

params! {
    Add of "add" { width: u32, rows: u32 }
    Embed of "embed" { width: u32, stride: u32, first_row: u32, rows: u32 }
    Product of "linear_few", "linear_many" {
        columns: u32, stride: u32, outputs: u32, first: u32, width: u32, rows: u32,
    }
    Experts of "experts_few", "experts_many" {
        columns: u32, stride: u32, rows: u32, first: u32, width: u32, first_expert: u32, experts: u32, top_k: u32,
        by_token: u32, most_tiles: u32,
    }
    Combine of "experts_combine" { width: u32, top_k: u32, first_expert: u32, experts: u32 }
    Group of "experts_group" { top_k: u32, first_expert: u32, experts: u32, tile: u32, most_tiles: u32 }
    Fill of "fill" {
        first: u32, words: u32, element: u32, columns: u32, stride: u32, narrow: u32, packed: u32, seed: u32, mean: f32,
        scale: f32,
    }
    GatedNorm of "gated_norm" { heads: u32, width: u32, eps: f32 }
    KdaGates of "kda_gates" { channels: u32, heads: u32 }
    Kda of "kda_chunk", "kda_step", "trace_kda" {
        key_heads: u32, heads: u32, key_width: u32, value_width: u32, form: u32, layer: u32, layers: u32,
    }
    MlaAppend of "mla_append" { latent: u32, rope: u32, block_tokens: u32, eps: f32 }
    Mla of "mla_decode", "mla_expand", "mla_prefill", "trace_attention" {
        heads: u32, latent: u32, nope: u32, rope: u32, value: u32, block_tokens: u32, first_row: u32, rows: u32,
        stride: u32, begin: u32, head: u32, places: u32,
    }
    RmsNorm of "rms_norm" { width: u32, eps: f32, rows: u32, gather: u32 }
    Route of "route" {
        experts: u32, top_k: u32, groups: u32, top_groups: u32, renormalize: u32, scale: f32, not_a_number: u32,
    }
    Select of "select" { vocabulary: u32, candidates: u32, slices: u32 }
    ShortConv of "short_conv" { channels: u32, taps: u32, stride: u32 }
    Swiglu of "swiglu" { width: u32, rows: u32 }
    TraceGate of "trace_gate" { heads: u32, width: u32, layer: u32, layers: u32 }
    TraceRoute of "trace_route" { top: u32, layer: u32, layers: u32 }
    TraceState of "trace_state" { heads: u32, head: u32, size: u32 }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::ALL;
    use crate::backend::wgpu::shaders;

    /// The fields of a shader's parameters, with their types; `None` where it takes none.
    fn fields(shader: &str) -> Option<Vec<(String, &'static str)>> {
        let source = shaders::source(shader, false).unwrap();
        let module = naga::front::wgsl::parse_str(&source).unwrap();
        let mut variables = module.global_variables.iter();
        let (_, params) =
            variables.find(|(_, variable)| variable.name.as_deref() == Some("params"))?;
        let naga::TypeInner::Struct { members, .. } = &module.types[params.ty].inner else {
            panic!("{shader}: params is no struct");
        };
        let field = |member: &naga::StructMember| {
            let kind = match module.types[member.ty].inner {
                naga::TypeInner::Scalar(naga::Scalar::U32) => "u32",
                naga::TypeInner::Scalar(naga::Scalar::F32) => "f32",
                ref other => panic!("{shader}: {other:?}"),
            };
            (member.name.clone().unwrap_or_default(), kind)
        };
        Some(members.iter().map(field).collect())
    }

    #[test]
    fn every_shader_takes_the_parameters_that_it_is_given() {
        let mut known = BTreeSet::new();
        for (names, expected) in ALL {
            for shader in *names {
                known.insert(*shader);
                let found = fields(shader).unwrap();
                let found: Vec<_> = found
                    .iter()
                    .map(|(name, kind)| (name.as_str(), *kind))
                    .collect();
                assert_eq!(found, *expected, "{shader}");
            }
        }
        for shader in shaders::names() {
            let takes = fields(shader).is_some() && !shader.is_empty();
            let part = ["linear", "experts"].contains(&shader);
            assert_eq!(takes && !part, known.contains(shader), "{shader}");
        }
    }
}
