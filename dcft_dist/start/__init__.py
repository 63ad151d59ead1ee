"""First steps: `init` (a configuration from a few answers), `doctor` (a look at the machine), `examples` (for the help),
`completion` (in a shell), `command` (these on the command line)."""
