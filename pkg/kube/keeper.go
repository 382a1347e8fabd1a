// SPDX-License-Identifier: Apache-2.0

package kube

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/edge-tunnel/edge-tunnel/pkg/identity"
)

// Keys in the Secret and the ConfigMap of the CA.
const (
	keyCACert = "ca.crt"
	keyCAKey  = "ca.key"
)

// keeper keeps the CA in a Secret and what is to be believed in a ConfigMap. Both are made by who installs us, empty: the right to create
// Secrets cannot be limited to one name, and would be the right to have a token of every account of the namespace made.
type keeper struct {
	client                   kubernetes.Interface
	namespace, secret, trust string
	o                        identity.AuthorityOptions
	skew                     func() time.Duration
	log                      *slog.Logger

	mu  sync.Mutex
	ca  *identity.Authority // nil until it was read once; kept when it cannot be read again
	err error               // of the last look
}

// look reads the CA, replaces it if it is time, and puts the bundle right.
func (k *keeper) look(ctx context.Context) error {
	ca, err := k.turn(ctx)
	k.mu.Lock()
	defer k.mu.Unlock()
	if ctx.Err() != nil {
		return ctx.Err() // says nothing about the CA
	}
	k.err = err
	if err == nil {
		k.ca = ca
	}
	return err
}

func (k *keeper) authority() (ca *identity.Authority, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.ca, k.err
}

func (k *keeper) turn(ctx context.Context) (*identity.Authority, error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	secret, err := k.client.CoreV1().Secrets(k.namespace).Get(ctx, k.secret, metav1.GetOptions{})
	if err != nil {
		return nil, k.missing("Secret", k.secret, "secret generic", err)
	}
	trust, err := k.client.CoreV1().ConfigMaps(k.namespace).Get(ctx, k.trust, metav1.GetOptions{})
	if err != nil {
		return nil, k.missing("ConfigMap", k.trust, "configmap", err)
	}
	if err := checkSkew(k.skew()); err != nil {
		return nil, err
	}
	ca, err := identity.ParseAuthority(secret.Data[keyCACert], secret.Data[keyCAKey], k.o)
	if err != nil {
		return nil, fmt.Errorf("read Secret %s/%s: %w; restore it, or empty it to have a new CA made", k.namespace, k.secret, err)
	}
	if published := []byte(trust.Data[keyCACert]); len(ca.CAs()) == 0 && len(bytes.TrimSpace(published)) > 0 {
		k.log.Warn("the CA was lost, what it has signed is believed until it has ended", "secret", k.secret)
		if lives, err := ca.Believe(published); err != nil {
			k.log.Warn("what the lost CA has signed is not believed", "configmap", k.trust, "err", err)
		} else {
			ca = lives
		}
	}
	ca, changed, err := ca.Rotate()
	if err != nil {
		return nil, err
	}
	// The Secret first: what is believed must not be lost. Both updates fail if somebody else was faster.
	if changed {
		if err := k.save(ctx, secret, ca); err != nil {
			return nil, err
		}
	}
	if bundle := string(ca.Bundle()); trust.Data[keyCACert] != bundle {
		trust = trust.DeepCopy()
		if trust.Data == nil {
			trust.Data = map[string]string{}
		}
		trust.Data[keyCACert] = bundle
		if _, err := k.client.CoreV1().ConfigMaps(k.namespace).Update(ctx, trust, metav1.UpdateOptions{}); err != nil {
			return nil, fmt.Errorf("publish CA certificates: %w", err)
		}
		k.log.Info("CA certificates published", "configmap", k.trust, "cas", len(ca.CAs()))
	}
	return ca, nil
}

func (k *keeper) save(ctx context.Context, secret *corev1.Secret, ca *identity.Authority) error {
	certs, keys, err := ca.Encode()
	if err != nil {
		return err
	}
	secret = secret.DeepCopy()
	if secret.Data == nil {
		secret.Data = map[string][]byte{}
	}
	secret.Data[keyCACert], secret.Data[keyCAKey] = certs, keys
	if _, err := k.client.CoreV1().Secrets(k.namespace).Update(ctx, secret, metav1.UpdateOptions{}); err != nil {
		return fmt.Errorf("keep CA: %w", err)
	}
	k.log.Info("CA rotated", "secret", k.secret, "cas", len(ca.CAs()))
	return nil
}

func (k *keeper) missing(kind, name, create string, err error) error {
	if apierrors.IsNotFound(err) {
		return fmt.Errorf("%s %s/%s is missing: kubectl -n %[2]s create %[4]s %[3]s makes an empty one, which is filled", kind, k.namespace, name, create)
	}
	return fmt.Errorf("read CA: %w", err)
}

// run looks every so often until ctx ends; more often while something is wrong.
func (k *keeper) run(ctx context.Context, every, retry time.Duration, looked func(error)) {
	for last := ""; ; {
		err := k.look(ctx)
		if ctx.Err() != nil {
			return
		}
		pause, text := every, ""
		if err != nil {
			pause, text = retry, err.Error()
		}
		if text != "" && text != last {
			k.log.Error("the CA cannot be kept", "err", err)
		}
		last = text
		looked(err)
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
	}
}

var errNoCA = errors.New("the CA has not been read yet")
