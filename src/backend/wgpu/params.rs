//! The parameters of each shader, with the fields of its `struct Params`; a test compares the two.

/// Defines structs of parameters, in a module `params` beside the code that fills them, and lists the shaders that use each.
macro_rules! declare {
    ($($name:ident of $($shader:literal),+ { $($field:ident: $type:ty),* $(,)? })*) => {
        pub(super) mod params {
            $(
                #[doc = concat!("Parameters of `", $($shader, "` `",)+ "`.")]
                #[repr(C)]
                #[derive(Clone, Copy, Debug, Default, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
                pub(in crate::backend::wgpu) struct $name {
                    $(pub(in crate::backend::wgpu) $field: $type),*
                }
            )*

            /// Shaders, and names and types of the fields.
            #[cfg(test)]
            pub(in crate::backend::wgpu) const ALL: &[$crate::backend::wgpu::params::Declared] =
                &[$((&[$($shader),+], &[$((stringify!($field), stringify!($type))),*])),*];
        }
    };
}
pub(super) use declare as params;

/// Shaders that use a struct, and names and types of its fields.
#[cfg(test)]
pub(super) type Declared = (
    &'static [&'static str],
    &'static [(&'static str, &'static str)],
);

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use crate::backend::wgpu::{
        answers, attention, experts, fill, kda, operations, sample, shaders, trace,
    };

    /// The fields of a shader's parameters, with their types; `None` if it has none.
    fn fields(shader: &str) -> Option<Vec<(String, &'static str)>> {
        let source = shaders::source(shader, false).unwrap();
        let module = naga::front::wgsl::parse_str(&source).unwrap();
        let mut variables = module.global_variables.iter();
        let (_, params) =
            variables.find(|(_, variable)| variable.name.as_deref() == Some("params"))?;
        let naga::TypeInner::Struct { members, .. } = &module.types[params.ty].inner else {
            panic!("{shader}: params is not a struct");
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
        let all = [
            answers::params::ALL,
            attention::params::ALL,
            experts::params::ALL,
            fill::params::ALL,
            kda::params::ALL,
            operations::params::ALL,
            sample::params::ALL,
            trace::params::ALL,
        ];
        for (names, expected) in all.concat() {
            for shader in names {
                known.insert(*shader);
                let found = fields(shader).unwrap();
                let found: Vec<_> = found
                    .iter()
                    .map(|(name, kind)| (name.as_str(), *kind))
                    .collect();
                assert_eq!(found, expected, "{shader}");
            }
        }
        for shader in shaders::names() {
            let takes = fields(shader).is_some() && !shader.is_empty();
            let part = ["linear", "experts"].contains(&shader);
            assert_eq!(takes && !part, known.contains(shader), "{shader}");
        }
    }
}
