// The index of a thread's element, in dispatches of one thread per element.

// The index of this thread in a grid folded into two dimensions.
fn flat(group: vec3<u32>, groups: vec3<u32>, thread: u32) -> u32 {
    return (group.y * groups.x + group.x) * 64u + thread;
}
