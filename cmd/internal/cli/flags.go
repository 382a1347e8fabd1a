// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"errors"
	"fmt"
	"io"
	"runtime"
	"strings"

	"github.com/spf13/pflag"
)

// Flags is a daemon's command line: groups of flags and the text around them.
type Flags struct {
	Summary  string   // what the program is, one or two sentences
	Synopsis []string // one for each way to call it, without the program's name; lines are broken as they are here
	Examples []Example
	Notes    string // after everything else; may be empty

	groups   []group
	required []string
	optional []optional
}

// optional are flags that are required unless excused says otherwise.
type optional struct {
	excused func() bool
	names   []string
}

// Example is a command that works, and what it is for.
type Example struct{ What, Command string }

type group struct {
	title string
	flags *pflag.FlagSet
}

// Group begins a group of flags; they show in the help below its title, in the order in which they are added.
func (f *Flags) Group(title string) *pflag.FlagSet {
	fs := newSet()
	f.groups = append(f.groups, group{title, fs})
	return fs
}

func newSet() *pflag.FlagSet {
	fs := pflag.NewFlagSet("", pflag.ContinueOnError)
	fs.SortFlags = false
	fs.Usage = func() {}
	return fs
}

// Require names flags without which the program cannot work.
func (f *Flags) Require(names ...string) { f.required = append(f.required, names...) }

// RequireUnless is Require for flags that others may take the place of: whether they do is asked after the flags were parsed.
func (f *Flags) RequireUnless(excused func() bool, names ...string) {
	f.optional = append(f.optional, optional{excused, names})
	f.Require(names...)
}

// Parse parses env.Args. After --help and --version, which it answers on env.Stdout, it returns [ErrDone]; what does
// not make sense is a [*UsageError].
func (f *Flags) Parse(env Env) error {
	var help, showVersion bool
	general := newSet()
	general.BoolVarP(&help, "help", "h", false, "Show this text.")
	general.BoolVar(&showVersion, "version", false, "Show the version.")
	groups := append(f.groups[:len(f.groups):len(f.groups)], group{"General", general})

	all := newSet()
	for _, g := range groups {
		all.AddFlagSet(g.flags)
	}
	Require(all, f.required...)
	err := all.Parse(env.Args)
	switch {
	case help: // even with a mistake behind it: this is what the user asks for
		f.help(env.Stdout, env.Name, groups)
		return ErrDone
	case err != nil:
		return FlagError(all, err)
	case showVersion:
		fmt.Fprintln(env.Stdout, VersionLine(env.Name))
		return ErrDone
	}
	for _, o := range f.optional {
		for _, name := range o.names {
			if o.excused() {
				delete(all.Lookup(name).Annotations, required)
			}
		}
	}
	return errors.Join(NoArgs(all.Args()), Missing(all))
}

// VersionLine is what --version shows.
func VersionLine(name string) string {
	return fmt.Sprintf("%s %s (%s %s/%s)", name, Version(), runtime.Version(), runtime.GOOS, runtime.GOARCH)
}

// NoArgs refuses arguments that no flag takes: nearly always it is the second entry of a list, or belongs to a switch that takes
// none.
func NoArgs(args []string) error {
	if len(args) == 0 {
		return nil
	}
	return WithHint(Usagef("unexpected argument %q", shortened(args[0])),
		"every value belongs to a flag; lists are written with commas or by repeating the flag")
}

// required marks flags, for [Missing] and the help.
const required = "edge_tunnel_required"

// Require marks flags of a set without which the program cannot work. It panics when there is none of a name.
func Require(fs *pflag.FlagSet, names ...string) {
	for _, name := range names {
		if err := fs.SetAnnotation(name, required, nil); err != nil {
			panic(err)
		}
	}
}

// Missing says which of the required flags were not given.
func Missing(fs *pflag.FlagSet) error {
	var missing []error
	fs.VisitAll(func(flag *pflag.Flag) {
		if _, wanted := flag.Annotations[required]; !wanted {
			return
		}
		if !flag.Changed {
			missing = append(missing, Usagef("--%s is required", flag.Name))
		} else if flag.Value.String() == "" {
			missing = append(missing, Usagef("--%s is empty", flag.Name))
		}
	})
	return errors.Join(missing...)
}

// FlagError turns pflag's errors into sentences for the user.
func FlagError(fs *pflag.FlagSet, err error) error {
	var (
		unknown *pflag.NotExistError
		value   *pflag.InvalidValueError
		lacking *pflag.ValueRequiredError
		syntax  *pflag.InvalidSyntaxError
	)
	switch {
	case errors.As(err, &unknown):
		return unknownFlag(fs, unknown)
	case errors.As(err, &value):
		return badValue(value.GetFlag(), value.GetValue(), value.Unwrap())
	case errors.As(err, &lacking):
		flag := lacking.GetFlag()
		return WithHint(Usagef("--%s needs a value", flag.Name), "expected "+expected(flag))
	case errors.As(err, &syntax):
		return WithHint(Usagef("%q is not a flag", shortened(syntax.GetSpecifiedFlag())), "flags look like --name value or --name=value")
	}
	return &UsageError{err}
}

func unknownFlag(fs *pflag.FlagSet, err *pflag.NotExistError) error {
	var names []string
	fs.VisitAll(func(f *pflag.Flag) {
		if !f.Hidden {
			names = append(names, f.Name)
		}
	})
	typed, shown := err.GetSpecifiedName(), "--"+err.GetSpecifiedName()
	if letters := err.GetSpecifiedShortnames(); letters != "" {
		typed, shown = letters, "-"+letters // -cert instead of --cert
		if typed, _, _ = strings.Cut(typed, "="); len(typed) == 1 {
			typed = ""
		}
	}
	usage := Usagef("unknown flag %s", shortened(shown))
	if name := Nearest(typed, names); name != "" {
		return WithHint(usage, fmt.Sprintf("did you mean --%s?", name))
	}
	return usage
}

func badValue(flag *pflag.Flag, text string, cause error) error {
	problem := cause
	if _, ours := flag.Value.(interface{ form() string }); !ours {
		problem = fmt.Errorf("%q is not %s", shortened(text), expected(flag)) // strconv's words are for programmers
	}
	if text == "" {
		problem = errors.New("the value is empty")
	}
	var all []error
	for _, one := range split(problem) {
		all = append(all, WithHint(Usagef("--%s: %w", flag.Name, one), "expected "+expected(flag)))
	}
	return errors.Join(all...)
}

// expected says how the value of a flag looks.
func expected(flag *pflag.Flag) string {
	if v, ok := flag.Value.(interface{ form() string }); ok {
		return v.form()
	}
	switch flag.Value.Type() {
	case "duration":
		return "a duration, such as 10s or 1m30s"
	case "bool":
		return "true or false"
	case "int", "int64", "uint", "uint16", "uint32", "uint64":
		return "a whole number"
	}
	name, _ := placeholder(flag)
	return name
}

// help teaches: what it is, how to call it, what can be said, what works.
func (f *Flags) help(w io.Writer, name string, groups []group) {
	WriteParagraphs(w, f.Summary)
	fmt.Fprint(w, "\nUSAGE\n")
	for _, s := range f.Synopsis {
		fmt.Fprintf(w, "  %s\n", strings.TrimSpace(name+" "+strings.ReplaceAll(s, "\n", "\n"+strings.Repeat(" ", len(name)+3))))
	}
	for _, g := range groups {
		fmt.Fprintf(w, "\n%s\n", strings.ToUpper(g.title))
		WriteFlags(w, g.flags)
	}
	WriteExamples(w, f.Examples)
	if f.Notes != "" {
		fmt.Fprintln(w)
		WriteParagraphs(w, f.Notes)
	}
}
