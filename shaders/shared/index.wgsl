// Which element is a thread's own, in dispatches of one thread an element.

// The number of this thread, counted through a grid folded into two dimensions.
fn flat(group: vec3<u32>, groups: vec3<u32>, thread: u32) -> u32 {
    return (group.y * groups.x + group.x) * 64u + thread;
}
