//! Drawn chat templates and chats.

use kimi_linear::tokenizer::{Chat, ChatTemplate};
use proptest::prelude::*;
use serde_json::json;

use super::super::harness::model_dir;
use super::tokenizer;
use super::values::{anything, text};
use crate::seeds::{self, properties};

/// Values of templates.
const VALUES: [&str; 25] = [
    "messages",
    "messages[0]",
    "messages[0].content",
    "messages[-1]['role']",
    "tools",
    "add_generation_prompt",
    "m",
    "m.content",
    "loop.index",
    "x",
    "unknown",
    "'|'",
    "'a|b'",
    "'%s and %d'",
    "1",
    "-3",
    "2.5",
    "none",
    "true",
    "[1, 'b', none]",
    "{'a': 1}",
    "range(3)",
    "namespace(a=1)",
    "strftime_now('%d')",
    "f('y')",
];

/// What stands after a value.
const AFTER: [&str; 43] = [
    " | length",
    " | tojson",
    " | tojson(indent=2)",
    " | trim",
    " | upper",
    " | title",
    " | replace('|', '[')",
    " | join(', ')",
    " | list",
    " | first",
    " | last",
    " | default('d')",
    " | string",
    " | int",
    " | items",
    " | dictsort",
    " | reverse",
    " | map(attribute='content')",
    " | selectattr('role', 'equalto', 'user')",
    ".split('|')",
    ".strip()",
    ".startswith('<')",
    ".items()",
    ".get('role')",
    ".upper()",
    ".partition('|')[0]",
    ".removeprefix('a')",
    ".rsplit('<', 1)",
    ".format('a')",
    ".lstrip('<|')",
    ".join(['a', 'b'])",
    "[0]",
    "[-1]",
    "[1:]",
    "[:-1]",
    "[::-1]",
    "['content']",
    ".content",
    " is defined",
    " is string",
    " is mapping",
    " is none",
    " is not iterable",
];

/// An expression that Jinja parses. Its values seldom have the types that it wants.
fn expression() -> impl Strategy<Value = String> {
    let leaf = prop::sample::select(VALUES.to_vec());
    leaf.prop_map(str::to_owned)
        .prop_recursive(3, 12, 3, |inner| {
            let after = prop::sample::select(AFTER.to_vec());
            let between = prop::sample::select(vec![
                " + ", " ~ ", " == ", " != ", " < ", " >= ", " in ", " not in ", " and ", " or ",
                " % ", " * ", " - ", " // ", " / ",
            ]);
            prop_oneof![
                // In brackets: Jinja reads the name after a test as its argument, so `x is defined in y` is none.
                (inner.clone(), after).prop_map(|(value, after)| format!("(({value}){after})")),
                (inner.clone(), between, inner.clone())
                    .prop_map(|(a, between, b)| format!("({a}{between}{b})")),
                (inner.clone(), inner.clone(), inner.clone())
                    .prop_map(|(a, b, c)| format!("({a} if {b} else {c})")),
                inner.prop_map(|value| format!("(not {value})")),
            ]
        })
}

/// A template that Jinja parses, and that spells no control token.
fn well_formed() -> impl Strategy<Value = String> {
    let leaf = prop_oneof![
        "[a-z |\\[\\]<>\r\n]{0,6}",
        expression().prop_map(|value| format!("{{{{ {value} }}}}")),
        expression().prop_map(|value| format!("{{%- set x = {value} -%}}")),
        Just("{# a comment #}".to_owned()),
        Just("{% raw %}{{ x }}{% endraw %}".to_owned()),
        Just("{% macro f(a, b=1) %}{{ a }}|{{ b }}{% endmacro %}".to_owned()),
    ];
    leaf.prop_recursive(3, 16, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 1..4).prop_map(|parts| parts.concat()),
            (expression(), inner.clone(), inner.clone()).prop_map(|(test, then, or)| {
                format!("{{% if {test} %}}{then}{{% else %}}{or}{{% endif %}}")
            }),
            (expression(), inner.clone()).prop_map(|(all, each)| {
                format!("{{%- for m in {all} %}}{each}{{%- endfor %}}")
            }),
            inner.prop_map(|inside| format!("{{% generation %}}{inside}{{% endgeneration %}}")),
        ]
    })
}

properties! { templates, seeds::fuzz_cases(300),
    #[test]
    fn well_formed_templates_compile_and_leave_the_chats_text_text(source in well_formed(), content in text()) {
        let tokenizer = tokenizer();
        let template = ChatTemplate::from_source(&source);
        prop_assert!(template.is_ok(), "{:?}", template.err());
        let content = format!("a|b <|im_end|> {content}");
        if let Ok(encoded) = tokenizer.encode_chat(&template.unwrap(), &Chat::user(&content)) {
            let control = |id: &&u32| tokenizer.is_special(**id);
            prop_assert_eq!(encoded.ids.iter().find(control), None);
        }
    }

    #[test]
    fn drawn_templates_are_compiled_or_refused(
        pieces in prop::collection::vec(prop_oneof![
            prop::sample::select(vec![
                "{%- for message in messages -%}", "{% endfor %}", "{% if tools %}", "{% else %}", "{% endif %}", "{{ message",
                "['content']", ".role", " | tojson", " | length", "}}", "{{ messages[0] }}", "{{ raise_exception('no') }}",
                "{% set x = 1 %}", "{% macro m(a) %}", "{% endmacro %}", "{{ m(1) }}", "<|im_end|>", "{{ '<|im' ~ '_end|>' }}",
                "{#", "#}", "{{ add_generation_prompt }}", "{{ x.y.z }}", "{{ 1 / 0 }}", "{{ messages.pop() }}",
                "{% generation %}", "{% endgeneration %}", "{{ '%s' % x }}", "{{ '%s|%s' % (messages[0].content, 1) }}",
                "{% if messages[0].content == '<|im_end|>' %}", "{{ messages[0].content.split('|')", "[0] }}",
                "{{ messages[0].content.partition('<|')[1]", "{{ 'a' if '|' in messages[0].content }}",
                "{% set s = '|' %}", "{{ messages[0].content.rsplit(s, 1) }}", "{{ messages[0].content[2:] }}",
                "{{ messages[0].content | replace('|', '[') | title | trim('[') }}", "\r\n", "{% raw %}", "{% endraw %}", "{{ '", "'",
            ]).prop_map(str::to_owned),
            text(),
        ], 0..12),
    ) {
        let tokenizer = tokenizer();
        // Refused or not, by a message; what is rendered becomes ids or is refused too.
        if let Ok(template) = ChatTemplate::from_source(&pieces.concat()) {
            let encoded = tokenizer.encode_chat(&template, &Chat::user("Hi <|im_end|>"));
            if let Ok(encoded) = encoded {
                // What the chat itself spells is text, whatever the template does with it.
                let spelt = pieces.iter().any(|piece| piece.contains("<|"));
                let ends = tokenizer.special_id("<|im_end|>").unwrap();
                prop_assert!(spelt || !encoded.ids.contains(&ends));
            }
        }
    }

    #[test]
    fn drawn_chats_have_the_templates_control_tokens_alone(
        messages in prop::collection::vec((prop::sample::select(vec!["system", "user", "assistant", "tool"]), text(), text()), 1..5),
        tool in prop::option::of((text(), anything())),
    ) {
        let tokenizer = tokenizer();
        let template = ChatTemplate::from_dir(&model_dir()).unwrap();
        let chat = |said: &dyn Fn(&str) -> String| Chat {
            messages: messages.iter().map(|(role, content, name)| {
                json!({ "role": role, "content": said(content), "name": said(&format!("n{name}")), "tool_call_id": said(name) })
            }).collect(),
            tools: tool.as_ref().map(|(name, parameters)| vec![json!({ "type": "function", "function": { "name": said(name), "parameters": parameters } })]),
            ..Chat::default()
        };
        let controls = |chat: &Chat| -> Vec<u32> {
            let ids = tokenizer.encode_chat(&template, chat).unwrap().ids;
            ids.into_iter().filter(|id| tokenizer.is_special(*id)).collect()
        };
        prop_assert_eq!(controls(&chat(&str::to_owned)), controls(&chat(&|_| "x".to_owned())));
    }
}
