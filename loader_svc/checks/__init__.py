"""What the kernel checks on the way of a module, each check where the kernel has it.

All are plain functions of the image, the kernel's identity and, where they depend on that, the modules that are live. A
check that fails gives the kernel's errno, its own short stable name (``vermagic``, ``symbols: unknown``) and the value
that offended. In the kernel's order (kernel/module/main.c, Linux 6.12):

- ``caller``: permission, flags, descriptor; then what can be wrong with the read itself;
- ``early``: signature policy, blacklist, symbol versions, vermagic, livepatch;
- the layout has its own (``loader_svc.image.layout``: a section that is writable and executable);
- ``linkage``: once the name is in the list: per-CPU room, ``exports``, ``symbols``, ``relocations``, ``parameters``.
"""
