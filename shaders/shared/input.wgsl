// The f32 rows that `shared/product` multiplies with a weight. The including shader declares `input`.

// Eight elements of the row of `input` that begins at `base`, zero past the last column.
fn input_eight(base: u32, first: u32, columns: u32) -> Eight {
    if (first + 8u <= columns) {
        let at = base + first;
        return Eight(
            vec4<f32>(input[at], input[at + 1u], input[at + 2u], input[at + 3u]),
            vec4<f32>(input[at + 4u], input[at + 5u], input[at + 6u], input[at + 7u]),
        );
    }
    var values = Eight(vec4<f32>(0.0), vec4<f32>(0.0));
    for (var i = 0u; i < 4u; i++) {
        if (first + i < columns) {
            values.a[i] = input[base + first + i];
        }
        if (first + 4u + i < columns) {
            values.b[i] = input[base + first + 4u + i];
        }
    }
    return values;
}
